"""What it takes for the small preset to find every kind of anomaly in minutes on a CPU.

Each trial trains a variant of the preset on DigitAnatomy for the same time and evaluates every
score on unseen handwriting. ``python -m bench.demo_trials --seconds 150`` runs all of them and
writes ``bench/results/demo_trials.json``; name trials to run only those.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from squid_fast.data import KINDS, DigitAnatomy
from squid_fast.experiments.demo import HELD_OUT_GRIDS, TRAINING_GRIDS, auroc_by_kind
from squid_fast.inference import Scorer
from squid_fast.presets import Preset, preset
from squid_fast.training import train_bundle

RESULTS = Path(__file__).parent / "results" / "demo_trials.json"

_V3 = [
    None,
    {"type": "MemoryMatrixBlockV3", "multiplier": 64, "num_memory": 9},
    {"type": "MemoryMatrixBlockV3", "multiplier": 16, "num_memory": 9},
]
_SKIPS = {"ops": ["concat", "concat", "none"], "decoder_memory": _V3}

TRIALS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "published": (
        "skips, decoder memories, weights and rates as published",
        _SKIPS,
        {"lr": 1e-4, "recon_w": 1.0},
    ),
    "published, faster": ("the same with lr 3e-3 and recon_w 10", _SKIPS, {}),
    "deepest skip": ("only the deepest skip", {"ops": ["concat", "none", "none"]}, {}),
    "small": ("no skips, no decoder memories: the preset", {}, {}),
    "lr 1e-3": ("the preset at a third of its rate", {}, {"lr": 1e-3}),
    "batch 32": ("the preset with larger batches", {}, {"batch_size": 32}),
    "1000 slots": ("the preset with five times the slots", {"num_slots": 1000}, {}),
    "no teacher": ("the preset without teacher and distillation", {"dist": False}, {}),
    "strong discriminator": (
        "the preset with adversarial weight 0.1 and a discriminator that learns ten times faster",
        {},
        {"g_w": 0.1, "d_w": 0.1, "discriminator_lr": 1e-3},
    ),
}


def run_trial(name: str, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Train one variant for ``seconds`` and return its figures."""
    about, model, changes = TRIALS[name]
    base = preset("small")
    recipe = replace(base.recipe, **changes)
    variant = Preset(name, base.image_size, {**base.model, **model}, recipe)
    cell = base.image_size // 3
    drawer = DigitAnatomy(None, cell, "train", seed)
    validation = DigitAnatomy(None, cell, "val", seed).normal(HELD_OUT_GRIDS, seed + 1)
    unseen = DigitAnatomy(None, cell, "test", seed)
    with tempfile.TemporaryDirectory() as out:
        result = train_bundle(
            variant,
            drawer.normal(TRAINING_GRIDS, seed).as_image_set(),
            Path(out),
            validation_set=validation.as_image_set(),
            seconds=seconds,
            seed=seed,
        )
        aurocs = auroc_by_kind(
            Scorer.load(out),
            unseen.normal(HELD_OUT_GRIDS, seed + 2),
            unseen.anomalous(HELD_OUT_GRIDS * len(KINDS), seed + 3),
        )
    return {"about": about, "grids": result.step * recipe.batch_size, "auroc": aurocs}


def main() -> None:
    """Run the trials and merge their figures into the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TRIALS)}")
    parser.add_argument("--seconds", type=float, default=150)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"trials": {}}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    results |= {
        "seconds": options.seconds,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }
    for name in options.names or TRIALS:
        results["trials"][name] = run_trial(name, options.seconds)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(results["trials"][name]), flush=True)


if __name__ == "__main__":
    main()
