"""What trained runs reach on the splits ``val`` and ``test``, by every score.

The figures of a run go to ``NAME.json``, with its configuration and curves, and ``NAME.svg`` shows
the curves; the name is that of the run's folder. Of several runs, the mean of their z-scores is
evaluated too, into ``together.json``.
"""

from __future__ import annotations

import csv
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from squid_fast import SQUID
from squid_fast.data import ImageSet, find_records
from squid_fast.experiments.research_scores import COMBINATIONS, evaluate_others
from squid_fast.inference import Scorer
from squid_fast.inference.bundle import load_bundle
from squid_fast.inference.scores import PAPER_SCORE
from squid_fast.metrics import evaluate

from ..arguments import add_data, add_output
from ..measurements import RESULTS, Results
from .data import held_out

CPU = torch.device("cpu")
PAPER_AUROC = 0.876  # SQUID on ZhangLab's own split, quoted from memory


def curves(run: Path) -> dict[str, list[list[float]]]:
    """Every figure of the run's log: name to [step, value] in order."""
    found: dict[str, list[list[float]]] = {}
    for row in csv.DictReader((run / "metrics.csv").read_text().splitlines()):
        found.setdefault(row["name"], []).append([int(row["step"]), round(float(row["value"]), 6)])
    return found


def evaluated(
    scorer: Scorer, model: SQUID, images: ImageSet
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Figures of every score, and the z-scores [n] of those that have them."""
    own, z_scores = scorer.evaluate(images)
    others, values = evaluate_others(model, images, z_scores)
    figures = {name: found.to_json() for name, found in (own | others).items()}
    return figures, z_scores | {name: values[name] for name in COMBINATIONS if name in values}


def together(
    images: ImageSet, z_scores: Sequence[Mapping[str, NDArray[np.float32]]]
) -> dict[str, Any]:
    """Figures of the mean over runs of every z-score."""
    labels = images.labels.numpy()
    means = {name: np.mean([z[name] for z in z_scores], axis=0) for name in z_scores[0]}
    return {name: evaluate(labels, z, score_name=name).to_json() for name, z in means.items()}


def draw(figures: dict[str, Any], path: Path) -> None:
    """Validation AUROC over minutes of training, of averaged and of unaveraged weights."""
    minutes = dict(figures["curves"]["time/minutes"])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("validation", "-"), ("unaveraged", ":")):
        for score, colour in ((PAPER_SCORE, "C0"), ("discriminator_image", "C1")):
            points = figures["curves"].get(f"{name}/auroc_{score}", [])
            label = f"{score}, {'averaged' if name == 'validation' else name}"
            axes.plot(
                [minutes[step] for step, _ in points], [auroc for _, auroc in points],
                style, color=colour, label=label,
            )  # fmt: skip
    axes.axhline(
        PAPER_AUROC, color="0.6", linewidth=1, linestyle=(0, (4, 3)),
        label="SQUID in the paper, on test images",
    )  # fmt: skip
    axes.set(xlabel="minutes of training", ylabel="AUROC on validation images", ylim=(0.3, 1))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def finish(results: Results) -> None:
    """Write the results file and print the AUROC of every score on test images."""
    results.write()
    test = results.figures["evaluation"]["test"]
    areas = {name: round(figures["auroc"], 4) for name, figures in test.items()}
    print(results.path.stem, json.dumps(areas), flush=True)


def add_arguments(parser: ArgumentParser) -> None:
    help = "Folders that squid-fast train has made."
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=help)
    add_data(parser)
    add_output(parser, RESULTS / "accuracy")


def main(options: Namespace) -> None:
    """Evaluate the runs and write a file for each, and one for all."""
    bundles = [load_bundle(run) for run in options.runs]
    images = held_out(find_records(options.data), bundles[0].model.image_size)
    z_scores: dict[str, list[Mapping[str, NDArray[np.float32]]]] = {split: [] for split in images}
    for run, bundle in zip(options.runs, bundles, strict=True):
        pair = bundle.model, bundle.discriminator
        scorer = Scorer(*pair, bundle.calibration, bundle.score)
        results = Results(options.output / f"{run.name}.json", CPU)
        evaluation = {}
        for split, labelled in images.items():
            evaluation[split], z = evaluated(scorer, bundle.model, labelled)
            z_scores[split].append(z)
        results.figures |= {"about": bundle.about, "evaluation": evaluation, "curves": curves(run)}
        finish(results)
        draw(results.figures, results.path.with_suffix(".svg"))
    if len(options.runs) > 1:
        results = Results(options.output / "together.json", CPU)
        results.figures |= {
            "runs": [run.name for run in options.runs],
            "evaluation": {split: together(images[split], z_scores[split]) for split in images},
        }
        finish(results)
