"""What training refuses, and that it does so before the first step."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from squid_fast import PRESETS
from squid_fast.data import ImageSet
from squid_fast.experiments.baselines import train_baseline
from squid_fast.inference.calibration import check_calibration
from squid_fast.presets import Recipe
from squid_fast.training import CheckpointError, train_bundle
from squid_fast.training.checkpoint import prepare_folder

pytest.importorskip("lightning_fabric")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": 0.0}, r"lr is 0.0; it must be a number above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"discriminator_lr": -1e-4}, "discriminator_lr is -0.0001"),
        ({"ema_decay": 1.0}, r"ema_decay is 1.0; it must lie in \(0, 1\), or be 0 for none"),
        ({"ema_decay": math.nan}, "ema_decay is nan"),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number from 1 on"),
        ({"epochs": 1.5}, "epochs is 1.5; it must be a whole number"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"betas": (0.5, 1.0)}, r"betas are \(0.5, 1.0\)"),
        ({"shift": 1.0}, "shift is 1.0"),
        ({"epochs": True}, "epochs is True; it must be a whole number"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0; it must be a whole number"),
        ({"lr": "1e-3"}, "lr is '1e-3'; it must be a number above 0"),
        ({"betas": 0.5}, "betas are 0.5; they must be two numbers"),
        ({"keep": "first"}, "keep is 'first'; it must be 'last' or 'best'"),
    ],
)
def test_a_recipe_that_nothing_can_be_trained_with(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe(**change)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"score": "distance"}, "score is 'distance'; it must be one of discriminator_instance"),
        ({"false_positive_rate": 5}, r"the false-positive rate is 5; it must lie in \(0, 1\)"),
        ({"false_positive_rate": math.nan}, "the false-positive rate is nan"),
        ({}, "19 normal training images and 0 for validation are too few .* it takes 20 of one "
         "kind. A rate of 0.0527 would fit"),
        ({"seed": -1}, "seed is -1; it must be a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"thread_count": 0}, "the number of threads is 0; it must lie between 1 and 1024"),
        ({"thread_count": 10**6}, "the number of threads is 1000000"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"log": "wandb"}, "the log is 'wandb'; it must be 'csv' or 'tensorboard'"),
        ({"device": "gpu"}, "device is 'gpu'; it must be 'cpu'"),
        ({"device": "meta"}, "device is 'meta', of which PyTorch sees none"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"seed": True}, "seed is True; it must be a whole number"),
        ({"thread_count": "2"}, "the number of threads is '2'; it must lie"),
        ({"false_positive_rate": "0.05"}, r"the false-positive rate is '0\.05'; it must lie in"),
        ({"seconds": "60"}, "seconds is '60'; it must be a number above 0"),
        ({"about": {"from": Path("a")}}, "about cannot be written as JSON: .*PosixPath is"),
        ({"about": {"share": math.nan}}, "about cannot be written as JSON: Out of range"),
        ({"recipe": Recipe(batch_size=20)}, "there are 19 training images, fewer than a batch"),
    ],
)  # fmt: skip
def test_what_would_fail_after_training_fails_before(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    pixels = torch.zeros(19, 1, 48, 48, dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(19).long(), [""] * 19)
    if options:
        options = {"false_positive_rate": 0.1} | options
    for method in ("squid", "autoencoder"):
        given = {"recipe": Recipe(epochs=1, batch_size=2), "device": "cpu"} | options
        if method != "squid" and given.keys() & {"score", "seconds", "log"}:
            continue
        first = PRESETS["small"] if method == "squid" else method
        call = train_bundle if method == "squid" else train_baseline
        with pytest.raises(ValueError, match=sentence):
            call(first, images, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_sets_of_other_labels_sizes_and_types_are_refused(tmp_path: Path) -> None:
    def images(*labels: int, side: int = 48) -> ImageSet:
        pixels = torch.zeros(len(labels), 1, side, side, dtype=torch.uint8)
        return ImageSet(pixels, torch.tensor(labels), [""] * len(labels))

    fitting = images(0, 0, -1, 0)
    options = {"recipe": Recipe(epochs=1, batch_size=2), "false_positive_rate": 0.25}
    cases: tuple[tuple[Any, Any, str], ...] = (
        (images(0, 1, 0, 1), None, r"2 of 4 images of train_set are labelled anomalous; train_set"),
        (fitting, images(0, 1, -1), r"1 of 3 images of validation_set have labels other than 0"),
        (fitting, images(0, 1, 2), r"1 of 3 images of validation_set have labels other than 0"),
        (fitting.images, None, r"train_set is of the type Tensor; it must be of the type ImageSet"),
        (fitting, fitting.images, r"validation_set is of the type Tensor; it must be"),
    )
    for train_set, validation_set, sentence in cases:
        for call, first in ((train_bundle, PRESETS["small"]), (train_baseline, "pca")):
            with pytest.raises((TypeError, ValueError), match=sentence):
                call(first, train_set, tmp_path / "run", validation_set=validation_set, **options)
    with pytest.raises(ValueError, match=r"^the images are 40 pixels wide; the model takes 48"):
        train_bundle(PRESETS["small"], images(0, 0, 0, 0, side=40), tmp_path / "run", **options)
    for given, sentence in (("small", "preset is of the type str"), (None, "preset is of the typ")):
        with pytest.raises(TypeError, match=sentence):
            train_bundle(given, fitting, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("context", "sentence"),
    [
        (torch.no_grad(), "training takes gradients, which"),
        (torch.inference_mode(), "training takes gradients, which"),
        (torch.autocast("cpu", torch.bfloat16), "is called inside torch.autocast, but its own"),
    ],
)
def test_training_is_not_called_where_it_cannot_learn(
    tmp_path: Path, context: AbstractContextManager[Any], sentence: str
) -> None:
    images = ImageSet(torch.zeros(4, 1, 48, 48, dtype=torch.uint8), torch.zeros(4).long(), [""] * 4)
    options = {"recipe": Recipe(epochs=1, batch_size=2), "false_positive_rate": 0.25}
    for call, first in ((train_bundle, PRESETS["small"]), (train_baseline, "autoencoder")):
        with context, pytest.raises(ValueError, match=sentence):
            call(first, images, tmp_path / "run", device="cpu", **options)
    assert not (tmp_path / "run").exists()


def test_the_fewest_normal_images_that_a_rate_takes() -> None:
    check_calibration(training=20, validation=0, false_positive_rate=0.05)
    check_calibration(training=2, validation=20, false_positive_rate=0.05)
    check_calibration(training=19, validation=0, false_positive_rate=0.0527)
    check_calibration(training=49, validation=0, false_positive_rate=1 / 49)
    # Of 4,000 training images every other is used, of 3,999 all.
    check_calibration(training=3999, validation=0, false_positive_rate=1 / 3999)
    check_calibration(training=4000, validation=0, false_positive_rate=1 / 4000, most=None)
    for training, validation, rate in ((19, 19, 0.05), (19, 0, 0.0526), (4000, 0, 1 / 4000)):
        with pytest.raises(ValueError, match="are too few for a threshold"):
            check_calibration(training, validation, rate)


def test_a_folder_that_holds_a_model_or_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "file").touch()
    for name, resume, kind, sentence in (
        ("model", False, CheckpointError, "model already holds a model; choose another folder"),
        ("new", True, CheckpointError, r"no checkpoint at .*checkpoint.pt; leave out --resume"),
        ("file/run", False, NotADirectoryError, "file' is a file; name another"),
    ):
        with pytest.raises(kind, match=sentence):
            prepare_folder(tmp_path / name, resume)
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]
