"""What the methods that SQUID is compared with reach on the splits ``val`` and ``test``.

Each is trained and evaluated. Figures go to ``comparison.json``, in which other methods stay.
"""

from __future__ import annotations

import dataclasses
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from squid_fast.data import ImageSet, find_records
from squid_fast.experiments.baselines import METHODS, RECIPE, load_scorer, train_baseline
from squid_fast.inference.bundle import read_json
from squid_fast.training import load_splits

from ..arguments import add_option
from ..measurements import Results
from .data import add_training, held_out


def measure(
    name: str, train_set: ImageSet, splits: dict[str, ImageSet], epochs: int, seed: int
) -> tuple[torch.device, dict[str, Any]]:
    """Train a method and evaluate it on the splits by name: the device and the figures."""
    recipe = dataclasses.replace(RECIPE, epochs=epochs, t_max=epochs)
    with tempfile.TemporaryDirectory() as folder:
        how = {"recipe": recipe, "validation_set": splits["val"], "seed": seed}
        train_baseline(name, train_set, Path(folder), **how)
        about = read_json(Path(folder) / "config.json")["about"]
        scorer = load_scorer(folder)
    found = {
        split: scorer.evaluate(images)[0][scorer.score_name].to_json()
        for split, images in splits.items()
    }
    return scorer.device, {"about": about, "evaluation": found}


def add_arguments(parser: ArgumentParser) -> None:
    add_training(parser, RECIPE.epochs)
    help, several = "Methods to measure; the others stay in the file", list(METHODS)
    add_option(parser, "--methods", several, help, choices=METHODS, metavar="METHOD")
    add_option(parser, "--size", 128, "Width and height of the images in pixels")


def main(options: Namespace) -> None:
    """Measure the methods and write the figures of each into the results file."""
    torch.set_num_threads(options.threads)
    records = find_records(options.data)
    train_set, _ = load_splits(records, options.size)
    splits = held_out(records, options.size)
    for name in options.methods:
        device, figures = measure(name, train_set, splits, options.epochs, options.seed)
        results = Results(options.output / "comparison.json", device, part=name)
        results.figures |= figures
        results.write()
        areas = {split: round(x["auroc"], 4) for split, x in figures["evaluation"].items()}
        print(name, areas, flush=True)
