"""The verb that trains SQUID without each of its parts: ablate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from typer import Option

from ..data import load_images
from ..experiments.ablation import (
    VARIANTS,
    AblationData,
    as_markdown,
    check_ablation,
    digit_data,
    run_ablation,
)
from ..presets import preset as find_preset
from ..training import load_splits
from ..utils.devices import choose_device, choose_precision
from . import options
from .console import print_json, print_table, say, stop_on_signals, training_report
from .datasets import found_records, labelled
from .tables import ablation_table


def ablate(
    out: Annotated[Path, Option(help="Folder for the trained models and the table.")],
    data: Annotated[
        Path | None,
        Option(
            help="Folder or CSV table of labelled images.", show_default="synthetic DigitAnatomy"
        ),
    ] = None,
    preset: options.Preset = "small",
    variants: Annotated[
        str, Option(help=f"Variants, comma-separated: {', '.join(VARIANTS)}.", show_default="all")
    ] = ",".join(VARIANTS),
    seeds: Annotated[int, Option(min=1, help="Number of runs of each variant.")] = 1,
    epochs: Annotated[int, Option(min=1, help="Number of epochs of each run.")] = 10,
    grids: Annotated[int, Option(min=16, help="Number of training grids without --data.")] = 2000,
    layout: options.Layout = "auto",
    mnist: options.Mnist = None,
    device: options.Device = None,
    precision: options.TrainingPrecision = "auto",
    threads: options.Threads = None,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Measure what each part of SQUID contributes.

    Trains the full model and variants that lack a part, all in the same way, and compares their
    AUROC on test images. Writes a folder for each run, ablation.json and ablation.md.

    Example: squid-fast ablate --out runs/ablation --variants full,no_inpainting
    """
    chosen = find_preset(preset)
    names = [name.strip() for name in variants.split(",")]
    choose_precision(precision, choose_device(device))  # refuses before grids are drawn
    check_ablation(chosen, out, names, seeds, threads, resume)
    recipe = dataclasses.replace(
        chosen.recipe, epochs=epochs, t_max=epochs, validate_every=max(1, epochs // 2)
    )
    if data is None:
        found = digit_data(chosen.image_size, grids, mnist)
    else:
        found = _images_of(data, layout, chosen.image_size)
    with stop_on_signals() as should_stop, training_report() as report:
        results = run_ablation(
            found, chosen, out,
            recipe=recipe, variants=names, seeds=seeds,
            device=device, precision=precision, thread_count=threads, resume=resume,
            say=say, report=report, should_stop=should_stop,
        )  # fmt: skip
    if results is None:
        say("stopped and saved; go on with --resume", "yellow")
        raise typer.Exit(130)
    (out / "ablation.md").write_text(as_markdown(results) + "\n", encoding="utf-8")
    if as_json:
        print_json(results)
    else:
        print_table(ablation_table(results))
    say(f"written: {out / 'ablation.json'}, {out / 'ablation.md'}")


def _images_of(data: Path, layout: str, side: int) -> AblationData:
    records = found_records(data, layout)
    train_set, validation_set = load_splits(records, side)
    images = load_images(labelled(records, "test", data), side)
    groups = {"test": torch.arange(len(images))}
    return AblationData(train_set, validation_set, images, groups, str(data))
