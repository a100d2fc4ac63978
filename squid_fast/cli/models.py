"""The verbs around models and their data: evaluate, convert, synth, demo."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ..data import load_images, write_digit_anatomy
from ..experiments.baselines import load_scorer
from ..experiments.demo import check_demo, demo_folder, run_demo
from ..experiments.research_scores import evaluate_others
from ..inference import Scorer, calibrate
from ..inference.bundle import Bundle, load_bundle, load_published, read_json, save_bundle
from ..inference.calibration import check_rate
from ..metrics import plot_roc
from ..presets import preset as find_preset
from ..training import load_splits
from ..training.checkpoint import CHECKPOINT
from ..utils.atomic import write_json
from ..utils.extras import require
from ..utils.outputs import check_distinct, check_folder
from . import options
from .console import print_json, print_table, progress_bar, say, stop_on_signals, training_report
from .datasets import found_records, labelled
from .tables import demo_table, evaluation_table


def evaluate(
    bundle: options.BundleFolder,
    data: options.Data,
    split: Annotated[
        str, Option(help="Split to evaluate, such as val; all for every labelled image.")
    ] = "test",
    layout: options.Layout = "auto",
    out: Annotated[
        Path | None,
        Option(
            help="Folder for evaluation.json and roc.png.",
            show_default="evaluation-SPLIT in the model's folder",
        ),
    ] = None,
    all_scores: Annotated[
        bool, Option("--all-scores", help="Research scores as well, of memories and teacher.")
    ] = False,
    device: options.Device = None,
    precision: options.Precision = "auto",
    backend: options.Backend = "eager",
    as_json: options.Json = False,
) -> None:
    """Measure how well a model tells anomalous images from normal.

    Reads labelled images and prints a table with AUROC, average precision, accuracy and more for
    every score. Writes the same figures to evaluation.json and the ROC curves to roc.png.

    Example: squid-fast evaluate runs/zhang --data chest_xray
    """
    out = out or bundle / f"evaluation-{split}"
    check_folder(out)
    for module in ("sklearn.metrics", "matplotlib.figure"):
        require(module, "train")
    scorer = load_scorer(bundle, precision=precision, device=device, backend=backend)
    scorer.calibration_of()  # raises before images are read
    records = labelled(found_records(data, layout), split, data)
    if len({record.label for record in records}) < 2:
        raise ValueError(
            f"the {len(records)} images of the split {split!r} are of one class; it takes normal "
            "and anomalous ones to measure how well they are told apart."
        )
    with progress_bar("reading images") as advance:
        images = load_images(records, scorer.image_size, on_progress=advance)
    evaluations, z = scorer.evaluate(images)
    if all_scores and isinstance(scorer, Scorer):
        others, other_z = evaluate_others(load_bundle(bundle).model, images, z, device=device)
        evaluations, z = evaluations | others, z | other_z
    out.mkdir(parents=True, exist_ok=True)
    figures = {name: evaluation.to_json() for name, evaluation in evaluations.items()}
    write_json(figures, out / "evaluation.json")
    plot_roc(out / "roc.png", {name: (images.labels.numpy(), values) for name, values in z.items()})
    if as_json:
        print_json(figures)
    else:
        print_table(evaluation_table(evaluations))
    say(f"written: {out / 'evaluation.json'}, {out / 'roc.png'}")


def convert(
    generator: Annotated[Path, Option(help="Published generator (.pth).")],
    discriminator: Annotated[Path, Option(help="Published discriminator (.pth).")],
    out: Annotated[Path, Option(help="Folder for the converted model.")],
    preset: Annotated[options.PresetName, Option(help="Network of the checkpoints.")] = "zhanglab",
    config: Annotated[
        Path | None,
        Option(help="JSON file with the arguments of squid_fast.SQUID, instead of --preset."),
    ] = None,
    data: Annotated[
        Path | None,
        Option(help="Normal images to set thresholds by.", show_default="no thresholds"),
    ] = None,
    layout: options.Layout = "auto",
    false_positive_rate: options.Rate = 0.05,
) -> None:
    """Convert checkpoints of the published code.

    Reads the two .pth files and, for thresholds, normal images. Writes a folder that evaluate,
    screen and export take like one that was trained here.

    Example: squid-fast convert --generator g.pth --discriminator d.pth --out runs/published
    """
    check_rate(false_positive_rate)
    check_folder(out)
    if (out / CHECKPOINT).exists():
        raise ValueError(f"{out} already holds a run; choose another folder.")
    read = [generator, discriminator, *([config] if config else [])]
    for path in options.model_files(out):
        check_distinct({"a file in --out": path}, {"the input": read})
    arguments = find_preset(preset).model if config is None else read_json(config)
    pair = load_published(generator, discriminator, arguments)
    calibration = None
    if data is not None:
        records = found_records(data, layout)
        with progress_bar("reading images") as advance:
            train_set, held_out = load_splits(records, pair[0].image_size, advance)
        normal = held_out.normal if held_out else None
        calibration = calibrate(*pair, train_set, normal, false_positive_rate)
    about = {"converted_from": [generator.name, discriminator.name]}
    save_bundle(Bundle(*pair, calibration, about=about), out)
    note = "" if calibration else "; without --data the model has no thresholds and cannot screen"
    say(f"written: {out}{note}")


def synth(
    out: Annotated[Path, Argument(help="Folder for the images.")],
    mnist: options.Mnist = None,
    cell: Annotated[int, Option(min=8, help="Side of one of a grid's nine cells in pixels.")] = 32,
    train_count: Annotated[int, Option("--train", min=1, help="Normal grids for training.")] = 2000,
    val_count: Annotated[
        int,
        Option("--val", min=0, help="Normal grids, and as many anomalous ones, for validation."),
    ] = 200,
    test_count: Annotated[
        int, Option("--test", min=0, help="Normal grids, and as many anomalous ones, for the test.")
    ] = 400,
    seed: options.Seed = 0,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replacement of earlier images.")
    ] = False,
) -> None:
    """Draw DigitAnatomy, the synthetic data set of the SQUID paper.

    A normal image is a grid of handwritten digits from 1 to 9; in an anomalous one some digits are
    missing, swapped, flipped or foreign. Writes images, masks of the anomalies and labels.csv.

    Example: squid-fast synth digits --train 4000
    """
    val, test = (val_count, val_count), (test_count, test_count)
    counts = {"train": (train_count, 0), "val": val, "test": test}
    with progress_bar("drawing grids") as advance:
        table = write_digit_anatomy(
            out, counts, mnist, cell, seed, overwrite=overwrite, on_progress=advance
        )
    say(f"written: {table}")


def demo(
    out: Annotated[
        Path | None,
        Option(help="Folder for all files.", show_default="runs/demo, in place of an earlier demo"),
    ] = None,
    minutes: Annotated[float, Option(min=0.01, help="Time until training ends, in minutes.")] = 4.0,
    mnist: options.Mnist = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Try the whole method in five minutes, on synthetic images.

    Draws DigitAnatomy, trains a small model, evaluates it, and screens unseen images. Needs no
    data. Writes the trained model, results.csv and report.html. Ctrl-C ends the training early.

    Example: squid-fast demo --minutes 2
    """
    check_demo(minutes, mnist, seed, device)  # before an earlier demo is deleted
    given = demo_folder(Path("runs/demo")) if out is None else nullcontext(out)
    with given as folder, stop_on_signals() as should_stop, training_report() as report:
        result = run_demo(
            folder, minutes, source=mnist, seed=seed, device=device,
            say=say, report=report, should_stop=should_stop,
        )  # fmt: skip
    if as_json:
        print_json(result.to_json())
    else:
        print_table(demo_table(result.aurocs, result.score))
        print(result.summary())
    if result.stopped:
        raise typer.Exit(130)
