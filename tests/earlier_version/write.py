"""Writes the files beside it: bundles and checkpoints of an earlier version, and their scores.

Run with the code of commit 12b740b on the Python path, which then are the files that every later
version has to read:

    PYTHONPATH=CHECKOUT OMP_NUM_THREADS=1 python tests/earlier_version/write.py

The networks are as narrow as they come, so that the files stay small.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from squid_fast import PRESETS, Preset
from squid_fast.data import ImageSet
from squid_fast.modules import discriminator
from squid_fast.training import train_bundle

HERE = Path(__file__).parent
SIDE = 64
MODEL: dict[str, Any] = {
    "num_in_ch": 1,
    "features_root": 1,
    "shrink_thres": 3,
    "num_slots": 8,
    "num_patch": 4,
    "level": 2,
    "memory_channel": 16,
    "dist": True,
    "initial_combine": 1,
    "mem_num_slots": 8,
    "ops": ["concat", "none"],
    "decoder_memory": [None, {"type": "MemoryMatrixBlock", "multiplier": 16, "num_memory": 4}],
}
RECIPE = dataclasses.replace(
    PRESETS["zhanglab_cpu"].recipe, batch_size=4, epochs=4, t_max=4, validate_every=1
)
PRESET = Preset("narrow", SIDE, MODEL, RECIPE)


def images(n: int, seed: int, anomalous: int = 0) -> ImageSet:
    """Mosaics of eight by eight squares; the anomalous ones are darker."""
    squares = torch.randint(256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    squares[:anomalous] //= 2
    pixels = squares.repeat_interleave(SIDE // 8, 2).repeat_interleave(SIDE // 8, 3)
    labels = (torch.arange(n) < anomalous).long()
    return ImageSet(pixels.to(torch.uint8), labels, [str(i) for i in range(n)])


DATA, VALIDATION, SHOWN = images(12, 1), images(24, 2, 4), images(6, 3, 2)
OPTIONS: dict[str, Any] = {
    "validation_set": VALIDATION,
    "false_positive_rate": 0.1,
    "device": "cpu",
    "precision": "float32",
}
SCORES = [
    ("squid", "discriminator_instance"),
    ("squid", "discriminator_running"),
    ("squid", "discriminator_image"),
    ("squid", "reconstruction_error"),
    ("squid", "patch_error"),
    ("autoencoder", "reconstruction_error"),
    ("pca", "distance"),
]


@contextmanager
def narrow(auto_encoder: type) -> Iterator[None]:
    """Discriminators of a few channels, and auto-encoders whose defaults are small."""
    with (
        patch.object(discriminator, "WIDTHS", (2, 4, 4, 4, 4)),
        patch.object(auto_encoder.__init__, "__defaults__", (SIDE, 1, 2, 2)),
    ):
        yield


def write() -> None:
    # Elsewhere today.
    from squid_fast.comparison import load_scorer, train_method
    from squid_fast.comparison.networks import AutoEncoder
    from squid_fast.machine import describe

    torch.set_num_threads(1)
    stopped = OPTIONS | {"should_stop": partial(next, itertools.cycle([False] * 4 + [True]))}
    scores: dict[str, Any] = {"machine": describe(torch.device("cpu"))}
    with TemporaryDirectory() as name, narrow(AutoEncoder):
        root = Path(name)
        train_bundle(PRESET, DATA, root / "squid", **OPTIONS)
        train_bundle(PRESET, DATA, root / "squid_stopped", **stopped)
        for method in ("autoencoder", "pca"):
            train_method(method, DATA, root / method, recipe=RECIPE, **OPTIONS)
        train_method("autoencoder", DATA, root / "autoencoder_stopped", recipe=RECIPE, **stopped)
        for method, score in SCORES:
            (root / method / "checkpoint.pt").unlink(missing_ok=True)
            found = load_scorer(root / method, score, "float32", "cpu").score(SHOWN.images)
            scores[f"{method}/{score}"] = [found.raw.tolist(), found.z_score.tolist()]
        shutil.make_archive(str(HERE / "files"), "xztar", root)
    (HERE / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    write()
