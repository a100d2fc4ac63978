"""The command line: one thin function for each verb."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ._extras import require

require("typer", "screen")
require("rich", "screen")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table  # noqa: E402

if TYPE_CHECKING:
    from .evaluation import Evaluation
    from .training import Progress as TrainingProgress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="SQUID: find what is unusual in radiographs, from normal ones alone. Research software, "
    "not a medical device.",
)
console = Console(stderr=True)  # progress and remarks; stdout is for results

Data = Annotated[Path, typer.Option("--data", help="Folder or table of images.")]
Layout = Annotated[str, typer.Option(help="How the data is laid out; found out unless named.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")]
PrecisionName = Annotated[str, typer.Option(help="auto, bf16 or float32.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Rate = Annotated[float, typer.Option(help="Share of normal images that may be flagged.")]


def _version(shown: bool) -> None:
    if shown:
        from . import __version__

        print(f"squid-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Run folder; becomes the trained bundle.")],
    preset: Annotated[str, typer.Option(help="zhanglab, chexpert, digit_anatomy, small.")] = (
        "zhanglab"
    ),
    layout: Layout = "auto",
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Of the generator.")] = None,
    validate_every: Annotated[int | None, typer.Option(min=1, help="Epochs.")] = None,
    score: Annotated[str, typer.Option(help="What the bundle screens by.")] = (
        "discriminator_instance"
    ),
    false_positive_rate: Rate = 0.05,
    seed: int = 0,
    device: Device = None,
    precision: PrecisionName = "auto",
    log: Annotated[str, typer.Option(help="csv or tensorboard.")] = "csv",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train on normal images; Ctrl-C saves, --resume goes on."""
    from .data import find_records
    from .presets import preset as find_preset
    from .training import load_splits, train_bundle

    chosen = find_preset(preset)
    recipe = dataclasses.replace(
        chosen.recipe,
        **_given(epochs=epochs, batch_size=batch_size, lr=lr, validate_every=validate_every),
    )
    with _bar("reading images") as advance:
        train_set, validation_set = load_splits(
            find_records(data, layout), chosen.image_size, advance
        )
    console.print(
        f"{len(train_set)} normal training images, "
        f"{0 if validation_set is None else len(validation_set)} for validation"
    )
    with stop_on_signals() as should_stop, training_report() as report:
        result = train_bundle(
            chosen,
            train_set,
            out,
            recipe=recipe,
            validation_set=validation_set,
            score=score,
            false_positive_rate=false_positive_rate,
            seed=seed,
            device=device,
            precision=precision,  # type: ignore[arg-type]
            resume=resume,
            log=log,  # type: ignore[arg-type]
            report=report,
            should_stop=should_stop,
        )
    if as_json:
        _print_json(
            {
                "finished": result.finished,
                "step": result.step,
                "validation": result.validation,
                "out": str(out),
            }
        )
    if not result.finished:
        console.print(f"[yellow]stopped after step {result.step} and saved[/]; go on with --resume")
        raise typer.Exit(130)
    console.print(
        f"trained: [bold]{out}[/]\nnext: squid-fast evaluate {out} --data {data}\n"
        f"      squid-fast screen {out} FILES... --out results.csv --report report.html"
    )


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Trained bundle.")],
    data: Data,
    split: Annotated[str, typer.Option(help="Which split to evaluate on.")] = "test",
    layout: Layout = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and roc.png.")] = (
        None
    ),
    device: Device = None,
    precision: PrecisionName = "auto",
    as_json: Json = False,
) -> None:
    """Figures of every score on labelled images, with a picture of the ROC curves."""
    from .data import find_records, load_images, select
    from .evaluation import plot_roc
    from .inference import Scorer

    scorer = Scorer.load(bundle, precision=precision, device=device)  # type: ignore[arg-type]
    records = [r for r in select(find_records(data, layout), split) if r.label is not None]
    if not records:
        raise ValueError(f"{data} has no labelled images in the split {split!r}.")
    with _bar("reading images") as advance:
        images = load_images(records, scorer.image_size, on_progress=advance)
    evaluations, z = scorer.evaluate(images)
    out = out or bundle / f"evaluation-{split}"
    out.mkdir(parents=True, exist_ok=True)
    figures = {name: evaluation.to_json() for name, evaluation in evaluations.items()}
    (out / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plot_roc(out / "roc.png", {name: (images.labels.numpy(), values) for name, values in z.items()})
    if as_json:
        _print_json(figures)
    else:
        Console().print(evaluation_table(evaluations))
    console.print(f"written: {out / 'evaluation.json'}, {out / 'roc.png'}")


@app.command()
def screen(
    bundle: Annotated[Path, typer.Argument(help="Trained bundle.")],
    paths: Annotated[list[str], typer.Argument(help="Files, folders and globs.")],
    out: Annotated[Path, typer.Option(help="Table: .parquet, .csv or .jsonl.")],
    report: Annotated[Path | None, typer.Option(help="HTML report.")] = None,
    score: Annotated[str | None, typer.Option(help="Another score than the bundle's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read files.")] = None,
    device: Device = None,
    precision: PrecisionName = "auto",
    as_json: Json = False,
) -> None:
    """Score files: one row for each, errors included, most unusual first in the report."""
    from .inference import Scorer
    from .screening import Summary, open_writer, write_report
    from .screening import screen as screen_files

    scorer = Scorer.load(bundle, score, precision, device)  # type: ignore[arg-type]
    summary = Summary()
    started = time.perf_counter()
    with _bar("screening") as advance, open_writer(out) as writer:
        rows = screen_files(scorer, paths, batch_size, workers, advance)
        writer.write(summary.watch(rows))
    seconds = time.perf_counter() - started
    if report is not None:
        write_report(
            report,
            scorer,
            summary,
            inputs=paths,
            model_name=bundle.name,
            results=out,
            reference_z=scorer.reference_z,
        )
    if as_json:
        _print_json({**summary.as_dict(), "seconds": round(seconds, 2), "out": str(out)})
    console.print(
        f"{summary.count} files in {seconds:.1f} s: {summary.flagged} flagged, "
        f"{summary.errors} with errors\ntable: {out}" + (f"\nreport: {report}" if report else "")
    )


@app.command()
def convert(
    generator: Annotated[Path, typer.Option(help="Published generator checkpoint, .pth.")],
    discriminator: Annotated[Path, typer.Option(help="Published discriminator checkpoint, .pth.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write.")],
    preset: Annotated[str, typer.Option(help="Configuration of the checkpoint.")] = "zhanglab",
    config: Annotated[
        Path | None, typer.Option(help="JSON of constructor arguments instead of a preset.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Normal images to calibrate on; needed for screening.")
    ] = None,
    layout: Layout = "auto",
    false_positive_rate: Rate = 0.05,
) -> None:
    """Turn a published pair of checkpoints into a bundle."""
    from .bundle import Bundle, load_published, save_bundle
    from .data import find_records
    from .inference import calibrate
    from .presets import preset as find_preset
    from .training import load_splits

    arguments = find_preset(preset).model if config is None else json.loads(config.read_text())
    model, judge = load_published(generator, discriminator, arguments)
    calibration = None
    if data is not None:
        with _bar("reading images") as advance:
            train_set, held_out = load_splits(find_records(data, layout), model.image_size, advance)
        normal = None if held_out is None else held_out.subset(held_out.labels == 0)
        calibration = calibrate(model, judge, train_set, normal, false_positive_rate)
    about = {"converted_from": [generator.name, discriminator.name]}
    save_bundle(Bundle(model, judge, calibration, about=about), out)
    note = "" if calibration else "; without --data it has no thresholds and cannot screen"
    console.print(f"written: {out}{note}")


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    mnist: Annotated[Path | None, typer.Option(help="MNIST IDX files; else bundled digits.")] = (
        None
    ),
    cell: Annotated[int, typer.Option(min=8, help="Pixels of a digit's cell.")] = 32,
    train_count: Annotated[int, typer.Option("--train", min=1, help="Normal grids.")] = 2000,
    val_count: Annotated[int, typer.Option("--val", min=0, help="Grids of each kind.")] = 200,
    test_count: Annotated[int, typer.Option("--test", min=0, help="Grids of each kind.")] = 400,
    seed: int = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Write DigitAnatomy, the paper's synthetic anatomy, with masks and a table."""
    from .data import write_digit_anatomy

    counts = {
        "train": (train_count, 0),
        "val": (val_count, val_count),
        "test": (test_count, test_count),
    }
    with _bar("drawing grids") as advance:
        table = write_digit_anatomy(
            out, counts, mnist, cell, seed, overwrite=overwrite, on_progress=advance
        )
    console.print(f"written: {table}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Of training, about.")] = 5.0,
    mnist: Annotated[Path | None, typer.Option(help="MNIST IDX files; else bundled digits.")] = (
        None
    ),
    seed: int = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """The whole method in minutes: draw DigitAnatomy, train, evaluate, screen, report."""
    from .demo import run_demo

    with stop_on_signals() as should_stop, training_report() as report:
        result = run_demo(
            out,
            minutes,
            source=mnist,
            seed=seed,
            device=device,
            say=console.print,
            report=report,
            should_stop=should_stop,
        )
    if result is None:
        console.print("[yellow]stopped[/]: the demo needs its training to end")
        raise typer.Exit(130)
    if as_json:
        _print_json(result.to_json())
    else:
        Console().print(demo_table(result.aurocs, result.best))
        print(result.summary())


# --- what people see ------------------------------------------------------------------------------


def evaluation_table(evaluations: dict[str, Evaluation]) -> Table:
    """One row for each score."""
    first = next(iter(evaluations.values()))
    table = Table(title=f"{first.n_normal} normal, {first.n_anomalous} anomalous images")
    table.add_column("score")
    for name in ("AUROC", "95 % interval", "AUPR"):
        table.add_column(name, justify="right")
    table.add_column("accuracy / F1 at best test threshold", justify="right")
    table.add_column("sensitivity / specificity calibrated", justify="right")
    for name, e in evaluations.items():
        paper, own = e.paper_best_test_accuracy, e.calibrated
        table.add_row(
            name,
            f"{e.auroc:.3f}",
            f"{e.auroc_interval[0]:.3f} - {e.auroc_interval[1]:.3f}",
            f"{e.auprc:.3f}",
            f"{paper.accuracy:.3f} / {paper.f1:.3f}",
            f"{own.sensitivity:.3f} / {own.specificity:.3f}" if own else "-",
        )
    return table


def demo_table(aurocs: dict[str, dict[str, float]], best: str) -> Table:
    """AUROC of every score for every kind of anomaly."""
    from .inference import PAPER_SCORE

    table = Table(title="AUROC on unseen grids, against normal ones")
    table.add_column("score")
    for kind in next(iter(aurocs.values())):
        table.add_column(kind, justify="right")
    for name, by_kind in aurocs.items():
        label = f"{name} (the paper's)" if name == PAPER_SCORE else name
        style = "bold" if name == best else ""
        table.add_row(label, *(f"{value:.3f}" for value in by_kind.values()), style=style)
    return table


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def training_report() -> Iterator[Callable[[TrainingProgress], None]]:
    """A progress bar with losses and time left; validation AUROCs become lines above it."""
    columns = (
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[losses]}[/]"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None, epoch=0, epochs=0, losses="", visible=False)
        shown = 0.0

        def report(state: TrainingProgress) -> None:
            nonlocal shown
            if state.validation is not None:
                figures = "  ".join(f"{k} {v:.3f}" for k, v in state.validation.items())
                progress.console.print(f"epoch {state.epoch + 1}: {figures}")
            now = time.monotonic()
            if now - shown < 0.5 and state.step < state.steps:
                return
            shown = now
            losses = "  ".join(f"{name} {value:.4f}" for name, value in state.losses().items())
            progress.update(
                task,
                completed=state.step,
                total=state.steps,
                epoch=state.epoch + 1,
                epochs=state.epochs,
                losses=losses,
                visible=True,
            )

        yield report


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or a termination asks for a stop after the step; a second Ctrl-C is at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        console.print("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()
