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
from squid_fast.experiments.baselines import (
    METHODS,
    RECIPE,
    BaselineScorer,
    load_scorer,
    train_baseline,
)
from squid_fast.inference.bundle import read_json
from squid_fast.training import load_splits

from ..arguments import add_data, add_option, add_output, add_seed, add_threads
from ..measurements import RESULTS, Results
from .data import held_out


def measure(
    name: str, train_set: ImageSet, splits: dict[str, ImageSet], epochs: int, seed: int
) -> tuple[torch.device, dict[str, Any]]:
    """Train a method and evaluate it on the splits by name: the device and the figures."""
    recipe = dataclasses.replace(RECIPE, epochs=epochs, t_max=epochs)
    with tempfile.TemporaryDirectory() as folder:
        train_baseline(
            name, train_set, Path(folder),
            recipe=recipe, validation_set=splits["val"], seed=seed,
        )  # fmt: skip
        about = read_json(Path(folder) / "config.json")["about"]
        scorer = load_scorer(folder)
    assert isinstance(scorer, BaselineScorer)
    found = {
        split: scorer.evaluate(images)[0][scorer.score_name].to_json()
        for split, images in splits.items()
    }
    return scorer.device, {"about": about, "evaluation": found}


def add_arguments(parser: ArgumentParser) -> None:
    add_data(parser)
    names = ", ".join(METHODS)
    help = f"Methods to measure; the others stay in the file. Default: all of {names}."
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help=help
    )
    add_option(parser, "--epochs", RECIPE.epochs, "Number of epochs of a network")
    add_option(parser, "--size", 128, "Width and height of the images in pixels")
    add_threads(parser)
    add_seed(parser)
    add_output(parser, RESULTS / "accuracy")


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
