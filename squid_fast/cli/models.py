"""The verbs around models and their data: evaluate, convert, synth, demo."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..data import find_records, load_images, select, write_digit_anatomy
from ..experiments.baselines import load_scorer
from ..experiments.demo import demo_folder, run_demo
from ..experiments.research_scores import evaluate_others
from ..inference import Scorer, calibrate
from ..inference.bundle import Bundle, load_bundle, load_published, save_bundle
from ..metrics import plot_roc
from ..presets import preset as find_preset
from ..training import load_splits
from .console import (
    demo_table,
    evaluation_table,
    print_json,
    print_table,
    progress_bar,
    say,
    stop_on_signals,
    training_report,
)
from .options import Data, Device, Json, Layout, Mnist, PrecisionName, Rate


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
        others, other_z = evaluate_others(load_bundle(bundle).model, images, z, device=device)
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
        normal = held_out.normal if held_out else None
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
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; else runs/demo, in place of the last.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="After which training ends.")] = 4.0,
    mnist: Mnist = None,
    seed: int = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """The whole method in minutes: draw DigitAnatomy, train, evaluate, screen, report."""
    with (
        demo_folder(Path("runs/demo")) if out is None else nullcontext(out) as folder,
        stop_on_signals() as should_stop,
        training_report() as report,
    ):
        result = run_demo(
            folder,
            minutes,
            source=mnist,
            seed=seed,
            device=device,
            say=say,
            report=report,
            should_stop=should_stop,
        )
    if as_json:
        print_json(result.to_json())
    else:
        print_table(demo_table(result.aurocs, result.score))
        print(result.summary())
    if result.stopped:
        raise typer.Exit(130)
