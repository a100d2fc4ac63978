"""Where scores lie on normal images, and what 8-bit convolutions have to know of a model."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ..data import ImageSet
from ..metrics import threshold_at_false_positive_rate
from ..modules import SQUID, Discriminator
from ..utils.devices import ScoringPrecision, choose_layout
from .quantization import Range, RangeRecorder, has_int8
from .scorer import Scorer, z_score
from .scores import PAPER_SCORE, SCORES, Calibration, Quantization, ScoreCalibration

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

    Mean and deviation come from training images, as in the paper (up to 2,000, evenly chosen), the
    thresholds from validation images. On CPUs that multiply bytes, the ranges of 8-bit scoring
    come along, and how well it ranks the same images.

    Args:
        normal_training, normal_validation: normal images only; too few validation images for the
            rate and the training images give the thresholds instead.
        false_positive_rate: share of normal images that a threshold may flag, in (0, 1).
        precision, device: of the scorer, see ``Scorer``.

    Raises:
        ValueError: no training images, or a rate outside (0, 1).
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(
            f"the false-positive rate is {false_positive_rate}; it must lie in (0, 1)."
        )
    training = _evenly(normal_training, _IMAGES)
    if len(training) < 2:
        raise ValueError(
            f"{len(training)} normal images cannot calibrate a score; give at least 2."
        )
    quantization = None
    if has_int8() and choose_layout(model.config["features_root"]) is torch.channels_last:
        quantization = _quantization(model, discriminator, training)
    known = Calibration({}, [], [], "", quantization)
    scorer = Scorer(model, discriminator, known, PAPER_SCORE, precision, device)
    logits, errors = scorer._look_at_all(training, SCORES)
    known = scorer.calibration = _with_patches(known, errors)
    raw = held_out_raw = scorer._derive(SCORES, logits, errors)
    source = "training"
    if normal_validation is not None and len(normal_validation) * false_positive_rate >= 1:
        held_out_raw, source = scorer.raw_scores(normal_validation), "validation"
    scores = {}
    for name, values in raw.items():
        mean, std = values.double().mean().item(), max(values.double().std().item(), 1e-12)
        z = z_score(name, held_out_raw[name], mean, std).numpy()
        threshold = threshold_at_false_positive_rate(z, false_positive_rate)
        scores[name] = ScoreCalibration(
            mean, std, threshold, false_positive_rate, np.sort(z).astype(float).round(4).tolist()
        )
    return dataclasses.replace(known, scores=scores, threshold_images=source)


def _quantization(
    model: SQUID, discriminator: Discriminator, normal: ImageSet
) -> Quantization | None:
    """Ranges of all convolutions, and the stages that can be in bytes without moving scores.

    Every stage is tried by itself. What it adds to the variance of the paper's score, measured in
    the variance that the score has among normal images, adds up nearly; those that add least are
    taken first, as far as ``_NOISE`` allows.
    """
    exact = Scorer(model, discriminator, precision="float32", device="cpu")
    ranges = observe_ranges(exact, _evenly(normal, _RANGE_IMAGES))
    images = _evenly(normal, _AGREEMENT_IMAGES)
    logits, errors = exact._look_at_all(images, SCORES)

    def rough(stages: list[str]) -> Scorer:
        known = Calibration({}, [], [], "", Quantization(stages, ranges, {}))
        return Scorer(model, discriminator, known, precision="int8", device="cpu")

    def noise(stages: list[str]) -> float:
        found = rough(stages)._look_at_all(images, [PAPER_SCORE])[0][PAPER_SCORE]
        right = logits[PAPER_SCORE]
        return float((found - right).double().var() / right.double().var())

    floor = noise([])
    names = [f"{part}.{i}" for part in ("downs", "ups") for i in range(model.level)]
    added = {name: max(noise([name]) - floor, 0.0) for name in names}
    stages, total = [], floor
    for name in sorted(names, key=lambda name: added[name]):
        total += added[name]
        if total <= _NOISE:
            stages.append(name)
    scorer = rough(sorted(stages))
    known = _with_patches(Calibration({}, [], [], "", None), errors)
    exact.calibration = known
    scorer.calibration = known
    values, others = exact._derive(SCORES, logits, errors), scorer.raw_scores(images)
    agreement = {name: rank_correlation(values[name], others[name]) for name in SCORES}
    return Quantization(sorted(stages), ranges, agreement)


def observe_ranges(scorer: Scorer, images: ImageSet) -> dict[str, Range]:
    """Of all convolutions of a float32 scorer, see ``RangeRecorder``."""
    recorder = RangeRecorder(scorer._generator)
    scorer._look_at_all(images, ())
    recorder.close()
    return recorder.ranges()


def _with_patches(calibration: Calibration, errors: Tensor) -> Calibration:
    """With mean and deviation of the patch errors [n, N]."""
    mean, std = errors.mean(dim=0), errors.std(dim=0).clamp_min(1e-12)
    return dataclasses.replace(calibration, patch_mean=mean.tolist(), patch_std=std.tolist())


def _evenly(images: ImageSet, most: int) -> ImageSet:
    """At most about that many, from all over the set."""
    return images.subset(list(range(0, len(images), max(1, len(images) // most))))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two vectors without ties."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return round(float(torch.corrcoef(ranks)[0, 1]), 5)
