"""AUROC over the share of abnormal images among those that training takes for normal.

SQUID is trained at every share. Figures go to ``contamination.json`` and their curve to
``contamination.svg``. Shares that are in the file with the same settings are not run again.
"""

from __future__ import annotations

import dataclasses
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from squid_fast import PRESETS, Scorer
from squid_fast.data import ImageSet, find_records, load_images, select
from squid_fast.data.contamination import check_apart, contaminated
from squid_fast.inference.scores import PAPER_SCORE
from squid_fast.presets import Preset
from squid_fast.training import load_splits, train_bundle

from ..arguments import add_folder, add_option
from ..measurements import Results
from .data import SPLITS, add_training, held_out

SCORES = (PAPER_SCORE, "discriminator_image")


def run(
    preset: Preset, train_set: ImageSet, splits: dict[str, ImageSet], seed: int
) -> dict[str, Any]:
    """Train on these images and evaluate on the splits by name."""
    with tempfile.TemporaryDirectory() as folder:
        trained = train_bundle(
            preset, train_set, Path(folder), validation_set=splits["val"], seed=seed
        )
        scorer = Scorer.load(folder)
    evaluation = {}
    for split, images in splits.items():
        figures, _ = scorer.evaluate(images)
        evaluation[split] = {name: figures[name].to_json() for name in SCORES}
    return {"minutes": round(trained.minutes, 2), "evaluation": evaluation}


def draw(runs: dict[str, Any], path: Path) -> None:
    """AUROC on test images over the rate, with its 95 % interval."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for colour, score in enumerate(SCORES):
        rates = sorted(runs, key=float)
        found = [runs[rate]["evaluation"]["test"][score] for rate in rates]
        areas = [figures["auroc"] for figures in found]
        below = [a - f["auroc_interval"][0] for a, f in zip(areas, found, strict=True)]
        above = [f["auroc_interval"][1] - a for a, f in zip(areas, found, strict=True)]
        axes.errorbar(
            [100 * float(rate) for rate in rates], areas, yerr=[below, above],
            color=f"C{colour}", marker="o", capsize=3, label=score,
        )  # fmt: skip
    axes.set(xlabel="abnormal among the training images, %", ylabel="AUROC on test images")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def add_arguments(parser: ArgumentParser) -> None:
    add_training(parser, epochs=10)
    help = "Folder of abnormal images, none of them in the splits 'val' and 'test' of the data."
    add_folder(parser, "--contaminants", help, required=True)
    add_option(parser, "--rates", [0.0, 0.1, 0.2], "Shares of abnormal images")
    add_option(parser, "--preset", "zhanglab_cpu", "Preset that is trained", choices=PRESETS)


def main(options: Namespace) -> None:
    """Run the shares and merge their figures into the results file."""
    torch.set_num_threads(options.threads)
    base, epochs = PRESETS[options.preset], options.epochs
    recipe = dataclasses.replace(base.recipe, epochs=epochs, validate_every=epochs)
    preset = dataclasses.replace(base, recipe=recipe)
    records, others = find_records(options.data), find_records(options.contaminants, "flat")
    seen = [record.path for split in SPLITS for record in select(records, split)]
    check_apart([record.path for record in others], seen)
    normal, _ = load_splits(records, base.image_size)
    odd = load_images(others, base.image_size)
    splits = held_out(records, base.image_size)
    settings = {"preset": base.name, "epochs": epochs, "seed": options.seed, "normal": len(normal)}
    path = options.output / "contamination.json"
    results = Results(path, torch.device("cpu"), {"settings": settings})
    results.resume("settings")
    runs = results.figures.setdefault("runs", {})
    for rate in (rate for rate in options.rates if f"{rate:g}" not in runs):
        mixed = contaminated(normal, odd, rate, options.seed)[0] if rate else normal
        found = runs[f"{rate:g}"] = run(preset, mixed, splits, options.seed)
        results.write()
        areas = {name: round(x["auroc"], 4) for name, x in found["evaluation"]["test"].items()}
        print(rate, areas, flush=True)
    draw(runs, path.with_suffix(".svg"))
