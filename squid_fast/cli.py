"""The command line: one thin function for each verb."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import __version__
from .benchmark import Benchmark, random_bundle
from .bundle import Bundle, load_bundle, load_published, save_bundle
from .console import (
    bench_table,
    demo_table,
    evaluation_table,
    print_json,
    print_table,
    progress_bar,
    say,
    stop_on_signals,
    training_report,
)
from .data import find_records, load_images, select, write_digit_anatomy
from .demo import new_folder, run_demo
from .devices import Precision, ScoringPrecision, choose_device
from .evaluation import plot_roc
from .inference import Scorer, calibrate
from .inference.export import write_export
from .presets import preset as find_preset
from .screening import (
    check_folder,
    check_output,
    read_list,
    screen_to_table,
    write_json,
    write_report,
)
from .screening import pack as pack_files
from .screening.reading import TIMEOUT
from .training import load_splits, train_bundle
from .training.logs import LogKind

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="SQUID: find what is unusual in radiographs, from normal ones alone. Research software, "
    "not a medical device.",
)

Data = Annotated[Path, typer.Option("--data", help="Folder or table of images.")]
Layout = Annotated[str, typer.Option(help="How the data is laid out; found out unless named.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")]
PrecisionName = Annotated[Precision, typer.Option(help="auto: bf16 where computed in.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Inputs = Annotated[list[str] | None, typer.Argument(help="Files, folders and globs.")]
FileList = Annotated[
    str | None,
    typer.Option("--list", help="File of names, or CSV with the column image_path; - is stdin."),
]
Root = Annotated[
    Path | None, typer.Option(help="Folder that the names in --list lie in; else the list's own.")
]
Mnist = Annotated[Path | None, typer.Option(help="MNIST IDX files; else bundled digits.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that read files.")]
Timeout = Annotated[float, typer.Option(help="Seconds that reading a file may take.")]
Rate = Annotated[float, typer.Option(help="Share of normal images that may be flagged.")]


def _version(shown: bool) -> None:
    if shown:
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
    log: Annotated[LogKind, typer.Option(help="Where figures go.")] = "csv",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train on normal images; Ctrl-C saves, --resume goes on."""
    chosen = find_preset(preset)
    recipe = dataclasses.replace(
        chosen.recipe,
        **_given(epochs=epochs, batch_size=batch_size, lr=lr, validate_every=validate_every),
    )
    with progress_bar("reading images") as advance:
        train_set, validation_set = load_splits(
            find_records(data, layout), chosen.image_size, advance
        )
    say(
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
            precision=precision,
            resume=resume,
            log=log,
            report=report,
            should_stop=should_stop,
        )
    if as_json:
        print_json(
            {
                "finished": result.finished,
                "step": result.step,
                "validation": result.validation,
                "out": str(out),
            }
        )
    if not result.finished:
        say(f"stopped after step {result.step} and saved; go on with --resume", "yellow")
        raise typer.Exit(130)
    say(
        f"trained: {out}\nnext: squid-fast evaluate {out} --data {data}\n"
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
    scorer = Scorer.load(bundle, precision=precision, device=device)
    records = [r for r in select(find_records(data, layout), split) if r.label is not None]
    if not records:
        raise ValueError(f"{data} has no labelled images in the split {split!r}.")
    with progress_bar("reading images") as advance:
        images = load_images(records, scorer.image_size, on_progress=advance)
    evaluations, z = scorer.evaluate(images)
    out = out or bundle / f"evaluation-{split}"
    out.mkdir(parents=True, exist_ok=True)
    figures = {name: evaluation.to_json() for name, evaluation in evaluations.items()}
    (out / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plot_roc(out / "roc.png", {name: (images.labels.numpy(), values) for name, values in z.items()})
    if as_json:
        print_json(figures)
    else:
        print_table(evaluation_table(evaluations))
    say(f"written: {out / 'evaluation.json'}, {out / 'roc.png'}")


@app.command()
def screen(
    bundle: Annotated[Path, typer.Argument(help="Trained bundle.")],
    out: Annotated[Path, typer.Option(help="Table: .parquet, .csv or .jsonl.")],
    paths: Inputs = None,
    listed: FileList = None,
    root: Root = None,
    report: Annotated[Path | None, typer.Option(help="HTML report.")] = None,
    summary: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    score: Annotated[str | None, typer.Option(help="Another score than the bundle's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    workers: Workers = None,
    timeout: Timeout = TIMEOUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of --out.")] = False,
    device: Device = None,
    precision: PrecisionName = "auto",
    as_json: Json = False,
) -> None:
    """Score files: one row for each, errors included; Ctrl-C keeps the rows, --resume goes on."""
    inputs = _inputs(paths, listed, root)
    check_output(out, resume)
    for path in (report, summary):
        if path is not None:
            check_folder(path)
    scorer = Scorer.load(bundle, score, precision, device)
    started = time.perf_counter()
    with progress_bar("screening") as advance, stop_on_signals() as should_stop:
        screened = screen_to_table(
            scorer,
            inputs,
            out,
            resume=resume,
            batch_size=batch_size,
            workers=workers,
            timeout=timeout,
            on_progress=advance,
            should_stop=should_stop,
            say=say,
        )
    if screened is None:
        raise typer.Exit(130)
    seconds = time.perf_counter() - started
    if report is not None:
        write_report(
            report,
            scorer,
            screened,
            inputs=[*(paths or []), *([listed] if listed else [])],
            model_name=bundle.name,
            results=out,
            reference_z=scorer.reference_z,
        )
    figures = {**screened.as_dict(), "seconds": round(seconds, 2), "out": str(out)}
    if summary is not None:
        write_json(figures, summary)
    if as_json:
        print_json(figures)
    say(
        f"{screened.count} files in {seconds:.1f} s: {screened.flagged} flagged, "
        f"{screened.errors} with errors\ntable: {out}" + (f"\nreport: {report}" if report else "")
    )


@app.command()
def pack(
    out: Annotated[Path, typer.Option(help="Folder for the packed images.")],
    paths: Inputs = None,
    listed: FileList = None,
    root: Root = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels per side.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Trained bundle, for its size.")] = None,
    workers: Workers = None,
    timeout: Timeout = TIMEOUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the shards in --out.")] = (
        False
    ),
    as_json: Json = False,
) -> None:
    """Decode files once into Arrow shards, which screen faster and as often as needed."""
    inputs = _inputs(paths, listed, root)
    side = size if bundle is None else load_bundle(bundle).model.image_size
    if side is None or None not in (size, bundle):
        raise ValueError("give either --size or the --bundle that the images are packed for")
    started = time.perf_counter()
    with progress_bar("packing") as advance:
        packed = pack_files(
            inputs,
            out,
            side,
            resume=resume,
            on_progress=advance,
            workers=workers,
            timeout=timeout,
        )
    seconds = round(time.perf_counter() - started, 2)
    if as_json:
        print_json({**dataclasses.asdict(packed), "seconds": seconds, "out": str(out)})
    say(
        f"{packed.files} files in {seconds:.1f} s: {packed.errors} with errors, "
        f"{packed.bytes / 1e6:.1f} MB in {packed.shards} shards\nfolder: {out}"
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
    arguments = find_preset(preset).model if config is None else json.loads(config.read_text())
    model, judge = load_published(generator, discriminator, arguments)
    calibration = None
    if data is not None:
        with progress_bar("reading images") as advance:
            train_set, held_out = load_splits(find_records(data, layout), model.image_size, advance)
        normal = None if held_out is None else held_out.subset(held_out.labels == 0)
        calibration = calibrate(model, judge, train_set, normal, false_positive_rate)
    about = {"converted_from": [generator.name, discriminator.name]}
    save_bundle(Bundle(model, judge, calibration, about=about), out)
    note = "" if calibration else "; without --data it has no thresholds and cannot screen"
    say(f"written: {out}{note}")


@app.command()
def export(
    bundle: Annotated[Path, typer.Argument(help="Trained bundle.")],
    out: Annotated[Path, typer.Option(help="File: .onnx, or .pt2 of PyTorch.")],
    score: Annotated[str | None, typer.Option(help="Another score than the bundle's.")] = None,
) -> None:
    """Write the scorer as a graph in float32 that runs without squid-fast: ONNX or PyTorch's."""
    check_folder(out)
    write_export(Scorer.load(bundle, score, "float32", "cpu"), out)
    say(f"written: {out}, {out.stat().st_size / 1e6:.1f} MB")


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    mnist: Mnist = None,
    cell: Annotated[int, typer.Option(min=8, help="Pixels of a digit's cell.")] = 32,
    train_count: Annotated[int, typer.Option("--train", min=1, help="Normal grids.")] = 2000,
    val_count: Annotated[
        int, typer.Option("--val", min=0, help="Normal grids, and as many anomalous ones.")
    ] = 200,
    test_count: Annotated[
        int, typer.Option("--test", min=0, help="Normal grids, and as many anomalous ones.")
    ] = 400,
    seed: int = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Write DigitAnatomy, the paper's synthetic anatomy, with masks and a table."""
    counts = {
        "train": (train_count, 0),
        "val": (val_count, val_count),
        "test": (test_count, test_count),
    }
    with progress_bar("drawing grids") as advance:
        table = write_digit_anatomy(
            out, counts, mnist, cell, seed, overwrite=overwrite, on_progress=advance
        )
    say(f"written: {table}")


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder to write; else a new one in runs.")] = (
        None
    ),
    minutes: Annotated[float, typer.Option(min=0.01, help="Of training, about.")] = 4.5,
    mnist: Mnist = None,
    seed: int = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """The whole method in minutes: draw DigitAnatomy, train, evaluate, screen, report."""
    with stop_on_signals() as should_stop, training_report() as report:
        result = run_demo(
            out or new_folder(Path("runs/demo")),
            minutes,
            source=mnist,
            seed=seed,
            device=device,
            say=say,
            report=report,
            should_stop=should_stop,
        )
    if result is None:
        say("stopped: the demo needs its training to end", "yellow")
        raise typer.Exit(130)
    if as_json:
        print_json(result.to_json())
    else:
        print_table(demo_table(result.aurocs, result.score))
        print(result.summary())


def _inputs(paths: list[str] | None, listed: str | None, root: Path | None) -> list[str]:
    """What is to be read: the names on the command line, then those in the list."""
    if not paths and listed is None:
        raise ValueError("nothing to read; name files, folders or globs, or a --list of files")
    if root is not None and listed is None:
        raise ValueError(f"--root {root} belongs to a --list, which is missing")
    return [*(paths or []), *(read_list(listed, root) if listed is not None else [])]


@app.command()
def bench(
    bundle: Annotated[
        Path | None, typer.Option(help="Trained bundle; else random weights, not in int8.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Model, where there is no bundle.")] = "zhanglab",
    data: Annotated[Path | None, typer.Option(help="Folder of images; else they are made up.")] = (
        None
    ),
    batch: Annotated[int, typer.Option(min=1, help="Images scored at once.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Times each way is timed.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="Of a run over files, about.")] = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    device: Device = None,
    precision: Annotated[ScoringPrecision, typer.Option(help="Of squid_fast.")] = "auto",
    as_json: Json = False,
) -> None:
    """How fast this machine scores, beside the published way; takes a minute or two."""
    if out is not None:
        check_folder(out)
    if threads is not None:
        torch.set_num_threads(threads)
    measured = load_bundle(bundle) if bundle else random_bundle(find_preset(preset))
    benchmark = Benchmark(measured, choose_device(device), precision, batch, rounds, seconds, data)
    about = {"model": str(bundle or preset), "data": str(data) if data else None}
    figures = about | benchmark.run(progress=progress_bar)
    if out is not None:
        write_json(figures, out)
    if as_json:
        print_json(figures)
    else:
        print_table(bench_table(figures))


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
