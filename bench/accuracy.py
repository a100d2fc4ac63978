"""What trained runs reach on labelled images: ``python -m bench.accuracy RUN ... --data DIR``.

For every run folder that ``squid-fast train`` left, all scores are evaluated on the splits ``val``
and ``test`` and written to ``bench/results/accuracy/<name>.json``, with the run's configuration and
its curves, and ``<name>.svg`` shows the curves. The name is the folder's.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from squid_fast.atomic import write_json
from squid_fast.bundle import load_bundle
from squid_fast.data import Record, find_records, load_images, select
from squid_fast.inference import Scorer
from squid_fast.inference.other_scores import evaluate_others
from squid_fast.scores import PAPER_SCORE

from .machine import describe

RESULTS = Path(__file__).parent / "results" / "accuracy"
SPLITS = ("val", "test")
PAPER_AUROC = 0.876  # SQUID on ZhangLab's own split, quoted from memory


def curves(run: Path) -> dict[str, list[list[float]]]:
    """Every figure of the run's log: name to [step, value] in order."""
    found: dict[str, list[list[float]]] = {}
    for row in csv.DictReader((run / "metrics.csv").read_text().splitlines()):
        found.setdefault(row["name"], []).append([int(row["step"]), round(float(row["value"]), 6)])
    return found


def evaluated(run: Path, records: list[Record], split: str) -> dict[str, Any]:
    """Figures by score, on the labelled images of one split."""
    scorer = Scorer.load(run)
    labelled = [record for record in select(records, split) if record.label is not None]
    images = load_images(labelled, scorer.image_size)
    own, z_scores = scorer.evaluate(images)
    others, _ = evaluate_others(load_bundle(run).model, images, z_scores)
    return {name: figures.to_json() for name, figures in (own | others).items()}


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
    axes.axhline(PAPER_AUROC, color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlabel="minutes of training", ylabel="AUROC on validation images", ylim=(0.3, 1))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Evaluate the runs and write a file for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    records = find_records(options.data)
    for run in options.runs:
        figures = {
            **describe(torch.device("cpu")),
            "about": load_bundle(run).about,
            "evaluation": {split: evaluated(run, records, split) for split in SPLITS},
            "curves": curves(run),
        }
        write_json(figures, options.output / f"{run.name}.json")
        draw(figures, options.output / f"{run.name}.svg")
        test = figures["evaluation"]["test"]
        print(run, json.dumps({name: round(test[name]["auroc"], 4) for name in test}), flush=True)


if __name__ == "__main__":
    main()
