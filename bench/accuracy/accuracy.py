"""What trained runs reach on labelled images: ``python -m bench accuracy RUN ... --data DIR``.

For every run folder that ``squid-fast train`` left, all scores are evaluated on the splits ``val``
and ``test`` and written to ``bench/results/accuracy/<name>.json``, with the run's configuration and
its curves, and ``<name>.svg`` shows the curves. The name is the folder's. Of several runs, the mean
of their z-scores is evaluated too, into ``together.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from squid_fast import SQUID
from squid_fast.data import ImageSet, find_records, load_images, select
from squid_fast.experiments.research_scores import COMBINATIONS, evaluate_others
from squid_fast.inference import Scorer
from squid_fast.inference.bundle import load_bundle
from squid_fast.inference.scores import PAPER_SCORE
from squid_fast.metrics import evaluate
from squid_fast.utils.atomic import write_json

from ..measurements import describe

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"
SPLITS = ("val", "test")
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


def show(name: str, figures: dict[str, Any]) -> None:
    """Print the areas on test images."""
    test = figures["evaluation"]["test"]
    print(name, json.dumps({key: round(test[key]["auroc"], 4) for key in test}), flush=True)


def main() -> None:
    """Evaluate the runs and write a file for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    bundles = [load_bundle(run) for run in options.runs]
    side = bundles[0].model.image_size
    labelled = [record for record in find_records(options.data) if record.label is not None]
    held_out = {split: load_images(select(labelled, split), side) for split in SPLITS}
    z_scores = []
    for run, bundle in zip(options.runs, bundles, strict=True):
        pair = bundle.model, bundle.discriminator
        scorer = Scorer(*pair, bundle.calibration, bundle.score)
        found = {s: evaluated(scorer, bundle.model, images) for s, images in held_out.items()}
        z_scores.append({split: z for split, (_, z) in found.items()})
        figures = {
            **describe(torch.device("cpu")),
            "about": bundle.about,
            "evaluation": {split: own for split, (own, _) in found.items()},
            "curves": curves(run),
        }
        write_json(figures, options.output / f"{run.name}.json")
        draw(figures, options.output / f"{run.name}.svg")
        show(run.name, figures)
    if len(options.runs) > 1:
        figures = {
            **describe(torch.device("cpu")),
            "runs": [run.name for run in options.runs],
            "evaluation": {
                split: together(images, [z[split] for z in z_scores])
                for split, images in held_out.items()
            },
        }
        write_json(figures, options.output / "together.json")
        show("together", figures)


if __name__ == "__main__":
    main()
