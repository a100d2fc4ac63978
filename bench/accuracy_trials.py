"""Which settings learn most per minute on a CPU, judged on validation images alone.

``python -m bench.accuracy_trials --data DIR`` trains the network of the ``zhanglab`` preset for a
few epochs with each of ``TRIALS`` and writes what every validation found, of averaged and of
unaveraged weights, to ``bench/results/accuracy/trials.json``; name trials to run only those.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from squid_fast import PRESETS
from squid_fast.atomic import write_json
from squid_fast.data import ImageSet, find_records
from squid_fast.modules import SQUID
from squid_fast.training import load_splits, train

from .machine import describe

RESULTS = Path(__file__).parent / "results" / "accuracy" / "trials.json"
PRESET = PRESETS["zhanglab"]

TRIALS: dict[str, tuple[str, dict[str, Any]]] = {
    "published": ("as published, but for the schedule, which ends with the run", {}),
    "lr 4e-4": ("the generator learns four times as fast", {"lr": 4e-4}),
    "batch 8": ("half the batch: twice the steps", {"batch_size": 8}),
    "batch 8, lr 4e-4": ("both", {"batch_size": 8, "lr": 4e-4}),
    "both 4e-4": ("generator and discriminator", {"lr": 4e-4, "discriminator_lr": 4e-4}),
    "discriminator 3e-5": ("a slower discriminator", {"lr": 4e-4, "discriminator_lr": 3e-5}),
    "n_critic 1": ("every batch trains the generator", {"lr": 4e-4, "n_critic": 1}),
}


def run_trial(
    name: str, train_set: ImageSet, validation_set: ImageSet, epochs: int, seed: int
) -> dict[str, Any]:
    """Train with one of ``TRIALS`` and return what each validation found."""
    about, changes = TRIALS[name]
    own = {"epochs": epochs, "t_max": epochs, "averaging": 0.99, "validate_every": epochs // 3}
    recipe = dataclasses.replace(PRESET.recipe, **{**own, **changes})
    torch.manual_seed(seed)
    model = SQUID(**PRESET.model)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(model, train_set, Path(folder), recipe, validation_set=validation_set, seed=seed)
        rows = list(csv.DictReader((Path(folder) / "metrics.csv").read_text().splitlines()))
    history: dict[str, list[list[float]]] = {}
    for row in rows:
        if "auroc" in row["name"] or row["name"] == "loss/reconstruction":
            point = [int(row["step"]), round(float(row["value"]), 4)]
            history.setdefault(row["name"], []).append(point)
    return {
        "about": about,
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "seconds": round(time.perf_counter() - started),
        "history": history,
    }


def main() -> None:
    """Run the trials and merge their figures into the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TRIALS)}")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_set, validation_set = load_splits(find_records(options.data), PRESET.image_size)
    if validation_set is None:
        parser.error(f"{options.data} has no labelled images in the split 'val'")
    for name in options.names or TRIALS:
        found = run_trial(name, train_set, validation_set, options.epochs, options.seed)
        found |= describe(torch.device("cpu"))
        results = json.loads(options.output.read_text()) if options.output.exists() else {}
        write_json({**results, name: found}, options.output)
        print(name, json.dumps(found["history"]), flush=True)


if __name__ == "__main__":
    main()
