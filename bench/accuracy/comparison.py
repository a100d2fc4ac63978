"""The baselines on labelled images: ``python -m bench accuracy comparison --data DIR``.

Trains every method of ``experiments.baselines`` and writes what each reaches on the splits ``val``
and ``test`` to ``bench/results/accuracy/comparison.json``. Methods that are named are measured
anew, the others stay in the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from squid_fast.data import ImageSet, find_records, load_images, select
from squid_fast.experiments.baselines import (
    METHODS,
    RECIPE,
    BaselineScorer,
    load_scorer,
    train_baseline,
)
from squid_fast.inference.bundle import read_json
from squid_fast.training import load_splits
from squid_fast.utils.atomic import write_json

from ..measurements import describe

RESULTS = Path(__file__).parents[1] / "results" / "accuracy" / "comparison.json"


def measure(
    name: str, train_set: ImageSet, held_out: dict[str, ImageSet], epochs: int, seed: int
) -> dict[str, Any]:
    """Train a method and evaluate it on the splits by name."""
    recipe = dataclasses.replace(RECIPE, epochs=epochs, t_max=epochs)
    with tempfile.TemporaryDirectory() as folder:
        train_baseline(
            name, train_set, Path(folder),
            recipe=recipe, validation_set=held_out["val"], seed=seed,
        )  # fmt: skip
        about = read_json(Path(folder) / "config.json")["about"]
        scorer = load_scorer(folder)
    assert isinstance(scorer, BaselineScorer)
    found = {
        split: scorer.evaluate(images)[0][scorer.score_name].to_json()
        for split, images in held_out.items()
    }
    return {**describe(scorer.device), "about": about, "evaluation": found}


def main() -> None:
    """Measure the methods and merge their figures into the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = find_records(options.data)
    train_set, validation_set = load_splits(records, options.size)
    if validation_set is None:
        parser.error(f"{options.data} has no labelled images in the split 'val'")
    labelled = [r for r in select(records, "test") if r.label is not None]
    held_out = {"val": validation_set, "test": load_images(labelled, options.size)}
    for name in options.methods:
        figures = measure(name, train_set, held_out, options.epochs, options.seed)
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        write_json({**known, name: figures}, options.output)
        print(name, {s: round(f["auroc"], 4) for s, f in figures["evaluation"].items()}, flush=True)


if __name__ == "__main__":
    main()
