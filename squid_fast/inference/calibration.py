"""Calibration: the distribution of scores on normal images, and which stages can be quantized."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..data import ImageSet
from ..metrics import count_above, threshold_at_false_positive_rate
from ..modules import SQUID, Discriminator
from ..utils.arguments import check_kind, is_number
from ..utils.devices import ScoringPrecision, choose_device, choose_layout
from .model import FrozenModel
from .precision import check_hardware
from .quantization import MinMaxObserver, Range, has_int8
from .scorer import BaseScorer, Scorer, checked_pair
from .scores import (
    PAPER_SCORE,
    SCORES,
    Calibration,
    Quantization,
    ScoreCalibration,
    raw_scores,
    z_score,
)

_NOTHING = Calibration({}, [], [], "")
_IMAGES = 2000  # of the training set; more do not move mean and deviation
_RANGE_IMAGES = 96
_AGREEMENT_IMAGES = 128
_NOISE = 0.0012  # share of a score's variance; 0.0018 would be a rank correlation of 0.999


def calibrate(
    model: SQUID,
    discriminator: Discriminator,
    normal_training: ImageSet,
    normal_validation: ImageSet | None = None,
    false_positive_rate: float = 0.05,
    precision: ScoringPrecision = "auto",
    device: str | torch.device | None = None,
) -> Calibration:
    """Calibrate every score on normal images.

    Mean and deviation come from training images, as in the paper (some 2,000, evenly chosen), the
    thresholds from validation images. On CPUs with int8 products, the ranges for scoring in int8
    are found too, and how far its ranking agrees with that of float32.

    Args:
        normal_training, normal_validation: normal images only; too few validation images for the
            rate and the training images give the thresholds instead.
        false_positive_rate: share of normal images that a threshold may flag, in (0, 1).
        precision, device: of the scorer, see ``Scorer``.

    Raises:
        ValueError: too few images for the rate, or a rate outside (0, 1).

    >>> model = SQUID(1, 8, 3, level=2, memory_channel=200, ops=["none", "none"])
    >>> pixels = torch.randint(0, 256, (20, 1, 40, 40), dtype=torch.uint8)
    >>> normal = ImageSet(pixels, torch.zeros(20, dtype=torch.int64), [""] * 20)
    >>> known = calibrate(model, Discriminator(2), normal, device="cpu")
    >>> known.scores["patch_error"].false_positive_rate, known.threshold_images
    (0.05, 'training')
    """
    model, discriminator = checked_pair(model, discriminator)
    check_normal("normal_training", normal_training, model.image_size)
    if normal_validation is not None:
        check_normal("normal_validation", normal_validation, model.image_size)
    held_out = 0 if normal_validation is None else len(normal_validation)
    check_calibration(len(normal_training), held_out, false_positive_rate)
    check_hardware(precision, choose_device(device))
    training = normal_training.subsample(_IMAGES)
    known = _NOTHING
    if has_int8() and choose_layout(model.config["features_root"]) is torch.channels_last:
        with torch.device("cpu"):  # whatever the default is
            quantization = _quantization(model, discriminator, training)
        known = dataclasses.replace(known, quantization=quantization)
    scorer = Scorer(model, discriminator, known, PAPER_SCORE, precision, device)
    logits, errors = scorer.model.measure_set(training, SCORES)
    scorer.calibration = _with_patches(known, errors)
    raw = raw_scores(SCORES, logits, errors, scorer.calibration)
    return calibrate_scores(scorer, raw, normal_validation, false_positive_rate)


def check_normal(name: str, images: ImageSet, side: int | None = None) -> None:
    """Raise TypeError or ValueError unless it is a set of normal images, of that side if given.

    Images of unknown label are taken as normal.
    """
    check_kind(name, images, ImageSet)
    if side is not None and images.images.shape[-1] != side:
        raise ValueError(
            f"the images are {images.images.shape[-1]} pixels wide; the model takes {side}."
        )
    if bad := int((images.labels > 0).sum()):
        raise ValueError(
            f"{bad} of {len(images)} images of {name} are labelled anomalous; {name}.normal leaves "
            "them out."
        )


def check_rate(false_positive_rate: float) -> None:
    """Raise ValueError for a false-positive rate that no threshold can have.

    >>> check_rate(5)
    Traceback (most recent call last):
    ValueError: the false-positive rate is 5; it must lie in (0, 1), such as 0.05.
    """
    if not (is_number(false_positive_rate) and 0 < false_positive_rate < 1):
        raise ValueError(
            f"the false-positive rate is {false_positive_rate!r}; it must lie in (0, 1), such as "
            "0.05."
        )


def check_calibration(
    training: int, validation: int, false_positive_rate: float, most: int | None = _IMAGES
) -> None:
    """Raise ValueError for numbers of normal images that give no threshold for the rate.

    Args:
        most: about as many of the training images are used, see ``ImageSet.subsample``; or all.

    >>> check_calibration(training=12, validation=0, false_positive_rate=0.05)
    Traceback (most recent call last):
    ValueError: 12 normal training images and 0 for validation are too few for a threshold ...
    """
    check_rate(false_positive_rate)
    if training < 2:
        raise ValueError(f"{training} normal images cannot calibrate a score; give 2 or more.")
    used = len(range(0, training, max(1, training // most))) if most else training
    greatest = max(used, validation)
    if not count_above(greatest, false_positive_rate):
        raise ValueError(
            f"{used} normal training images and {validation} for validation are too few for a "
            f"threshold with a false-positive rate of {false_positive_rate:g}: it takes "
            f"{math.ceil(1 / false_positive_rate - 1e-9)} of one kind. A rate of "
            f"{math.ceil(1e4 / greatest) / 1e4:g} would fit."
        )


def calibrate_scores(
    scorer: BaseScorer,
    training: Mapping[str, Tensor],
    normal_validation: ImageSet | None,
    false_positive_rate: float,
) -> Calibration:
    """Calibrate from ``training``, raw scores [n] of normal images by name; see ``calibrate``."""
    held_out, source = training, "training"
    if normal_validation is not None and count_above(len(normal_validation), false_positive_rate):
        held_out, source = scorer.raw_scores(normal_validation, list(training)), "validation"
    scores = {}
    for name, raw in training.items():
        mean, std = raw.double().mean().item(), max(raw.double().std().item(), 1e-12)
        z = np.sort(z_score(name, held_out[name], mean, std).numpy())
        threshold = threshold_at_false_positive_rate(z, false_positive_rate)
        reference = z.astype(float).round(4).tolist()
        scores[name] = ScoreCalibration(mean, std, threshold, false_positive_rate, reference)
    known = scorer.calibration or _NOTHING
    return dataclasses.replace(known, scores=scores, threshold_images=source)


def _quantization(model: SQUID, discriminator: Discriminator, normal: ImageSet) -> Quantization:
    """Ranges of all convolutions, and the stages that can be quantized without moving scores.

    What a stage adds to the variance of the paper's score, as a share of the variance among normal
    images, is nearly additive: the stages that add least are taken, as far as ``_NOISE`` allows.
    """
    exact = FrozenModel(model, discriminator)
    ranges = observe_ranges(exact, normal.subsample(_RANGE_IMAGES))
    images = normal.subsample(_AGREEMENT_IMAGES)
    logits, errors = exact.measure_set(images, SCORES)

    def quantized(stages: list[str]) -> FrozenModel:
        chosen = Quantization(stages, ranges, {})
        return FrozenModel(model, discriminator, "int8", quantization=chosen)

    def noise(stages: list[str]) -> float:
        right = logits[PAPER_SCORE]
        found = quantized(stages).measure_set(images, [PAPER_SCORE]).logits[PAPER_SCORE]
        return float((found - right).double().var() / right.double().var())

    floor = noise([])
    names = [f"{part}.{i}" for part in ("downs", "ups") for i in range(model.level)]
    added = {name: max(noise([name]) - floor, 0.0) for name in names}
    stages, total = [], floor
    for name in sorted(names, key=lambda name: added[name]):
        total += added[name]
        if total <= _NOISE:
            stages.append(name)
    stages.sort()
    patches = _with_patches(_NOTHING, errors)
    values = raw_scores(SCORES, logits, errors, patches)
    others = raw_scores(SCORES, *quantized(stages).measure_set(images, SCORES), patches)
    agreement = {name: rank_correlation(values[name], others[name]) for name in SCORES}
    return Quantization(stages, ranges, agreement)


def observe_ranges(model: FrozenModel, images: ImageSet) -> dict[str, Range]:
    """The ranges of all convolutions of a float32 model, see ``MinMaxObserver``."""
    observer = MinMaxObserver(model.generator)
    model.measure_set(images, ())
    observer.close()
    return observer.ranges()


def _with_patches(calibration: Calibration, errors: Tensor) -> Calibration:
    """With mean and deviation of the patch errors [n, N]."""
    mean, std = errors.mean(dim=0), errors.std(dim=0).clamp_min(1e-12)
    return dataclasses.replace(calibration, patch_mean=mean.tolist(), patch_std=std.tolist())


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two vectors without ties."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return round(float(torch.corrcoef(ranks)[0, 1]), 5)
