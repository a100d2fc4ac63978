"""The verbs around models and their data: train, evaluate, convert, synth, demo."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle import Bundle, load_bundle, load_published, save_bundle
from ..comparison import METHODS, RECIPE, load_scorer, train_method
from ..console import (
    demo_table,
    evaluation_table,
    print_json,
    print_table,
    progress_bar,
    say,
    stop_on_signals,
    training_report,
)
from ..data import find_records, load_images, select, write_digit_anatomy
from ..demo import new_folder, run_demo
from ..evaluation import plot_roc
from ..inference import Scorer, calibrate
from ..inference.other_scores import evaluate_others
from ..presets import preset as find_preset
from ..training import load_splits, train_bundle
from ..training.logs import LogKind
from .options import Data, Device, Json, Layout, Mnist, PrecisionName, Rate, TrainingPrecision


def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Run folder; becomes the trained bundle.")],
    preset: Annotated[
        str, typer.Option(help="zhanglab, zhanglab_cpu, chexpert, digit_anatomy, small.")
    ] = ("zhanglab"),
    method: Annotated[
        str, typer.Option(help=f"squid, or what it is compared with: {', '.join(METHODS)}.")
    ] = "squid",
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
    precision: TrainingPrecision = "auto",
    sync_batch_norm: Annotated[
        bool, typer.Option(help="Batch norm over the batches of all processes.")
    ] = True,
    graphs: Annotated[bool, typer.Option(help="On one GPU: the step as a CUDA graph.")] = True,
    log: Annotated[LogKind, typer.Option(help="Where figures go.")] = "csv",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train on normal images; Ctrl-C saves, --resume goes on."""
    chosen = find_preset(preset)
    recipe = dataclasses.replace(
        chosen.recipe if method == "squid" else RECIPE,
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
    if method != "squid":
        with stop_on_signals() as should_stop, training_report() as report:
            finished = train_method(
                method,
                train_set,
                out,
                recipe=recipe,
                validation_set=validation_set,
                false_positive_rate=false_positive_rate,
                seed=seed,
                device=device,
                precision=precision,
                resume=resume,
                report=report,
                should_stop=should_stop,
            )
        if not finished:
            say("stopped and saved; go on with --resume", "yellow")
            raise typer.Exit(130)
        say(f"trained: {out}")
        return
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
            sync_batch_norm=sync_batch_norm,
            graphs=graphs,
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


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Trained bundle.")],
    data: Data,
    split: Annotated[str, typer.Option(help="Which split to evaluate on.")] = "test",
    layout: Layout = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and roc.png.")] = (
        None
    ),
    all_scores: Annotated[
        bool, typer.Option("--all-scores", help="Also those for research, which take longer.")
    ] = False,
    device: Device = None,
    precision: PrecisionName = "auto",
    as_json: Json = False,
) -> None:
    """Figures of every score on labelled images, with a picture of the ROC curves."""
    scorer = load_scorer(bundle, precision=precision, device=device)
    records = [r for r in select(find_records(data, layout), split) if r.label is not None]
    if not records:
        raise ValueError(f"{data} has no labelled images in the split {split!r}.")
    with progress_bar("reading images") as advance:
        images = load_images(records, scorer.image_size, on_progress=advance)
    evaluations, z = scorer.evaluate(images)
    if all_scores and isinstance(scorer, Scorer):
        others, other_z = evaluate_others(load_bundle(bundle).model, images, device=device)
        evaluations, z = evaluations | others, z | other_z
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


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
