"""Metrics and calibration, on z-scores.

In all functions a larger ``z`` means less normal: ``z = (mean - s) / std`` with the discriminator's
logit ``s`` and its mean and standard deviation over normal training images. The published anomaly
score is ``sigmoid(z)``. It ranks images the same way, but in float32 it saturates and makes ties
that ``z`` does not have. ``labels`` are 0 or False for normal, 1 or True for anomalous images. An
image is flagged when its ``z`` is greater than the threshold.

>>> labels, z = [0, 0, 0, 1, 1], [-0.5, 0.1, 0.8, 0.6, 2.5]
>>> round(image_auroc(labels, z), 3)
0.833
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .utils.extras import require

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_CHUNK = 4_000_000  # scores drawn at a time in the bootstrap, to bound its memory


@dataclass(frozen=True)
class OperatingPoint:
    """Results of flagging every image with ``z > threshold``, as shares in [0, 1]."""

    threshold: float
    accuracy: float
    f1: float
    precision: float  # 0 when nothing is flagged
    sensitivity: float  # flagged share of the anomalous images, also called recall
    specificity: float  # unflagged share of the normal images


@dataclass(frozen=True)
class Evaluation:
    """All figures of one score on one labelled set of images."""

    score_name: str
    n_normal: int
    n_anomalous: int
    auroc: float
    auroc_interval: tuple[float, float]  # 95 %, stratified bootstrap
    auprc: float  # chance is n_anomalous / (n_normal + n_anomalous)
    paper_best_test_accuracy: OperatingPoint  # threshold chosen on these very labels
    calibrated: OperatingPoint | None  # threshold chosen beforehand, on other images
    false_positive_rate: float | None  # the rate that threshold was calibrated for

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and finite numbers, ready for ``json.dump``."""
        return asdict(self) | {"auroc_interval": list(self.auroc_interval)}


def image_auroc(labels: ArrayLike, z: ArrayLike) -> float:
    """Area under the ROC curve over images.

    It is the chance that an anomalous image ranks above a normal one; ties count half.

    Raises:
        ValueError: no images, images of one class, unequal lengths, or a ``z`` that is not finite.

    >>> image_auroc([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8])
    0.875
    """
    anomalous, scores = _checked(labels, z)
    return float(require("sklearn.metrics", "train").roc_auc_score(anomalous, scores))


def image_auprc(labels: ArrayLike, z: ArrayLike) -> float:
    """Area under the precision-recall curve, as average precision; errors as in ``image_auroc``.

    >>> image_auprc([0, 0, 1, 1], [0.1, 0.5, 0.4, 0.8])
    0.8333...
    """
    anomalous, scores = _checked(labels, z)
    return float(require("sklearn.metrics", "train").average_precision_score(anomalous, scores))


def bootstrap_auroc_interval(
    labels: ArrayLike, z: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the AUROC, stratified by label.

    Perfectly separated classes give (1, 1), and a handful of images an interval that is too narrow:
    resampling cannot know of images that were never seen.

    Raises:
        ValueError: as for ``image_auroc``, or ``confidence`` or ``resamples`` out of range.

    >>> low, high = bootstrap_auroc_interval([0, 0, 0, 1, 1, 1], [0.1, 0.3, 0.6, 0.4, 0.8, 0.9])
    >>> 0 <= low < 8 / 9 < high <= 1  # the AUROC itself is 8 / 9
    True
    """
    anomalous, scores = _checked(labels, z)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1")
    distinct, rank = np.unique(scores, return_inverse=True)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // len(scores))
    areas = []
    for done in range(0, resamples, chunk):
        rows = min(chunk, resamples - done)
        ranks = rank[~anomalous], rank[anomalous]
        areas.append(_areas(*(_resampled_counts(part, len(distinct), rows, rng) for part in ranks)))
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(np.concatenate(areas), quantiles)
    return float(low), float(high)


def _resampled_counts(
    rank: NDArray[np.intp], ranks: int, rows: int, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Draw ``rows`` bootstrap samples of ``rank``; how often each rank comes, [rows, ranks]."""
    drawn = rank[rng.integers(len(rank), size=(rows, len(rank)))]
    drawn += np.arange(rows)[:, None] * ranks
    return np.bincount(drawn.ravel(), minlength=rows * ranks).reshape(rows, ranks)


def _areas(normal: NDArray[np.intp], anomalous: NDArray[np.intp]) -> Floats:
    """AUROC of every row from its counts per rank, by the Mann-Whitney statistic, ties half."""
    half_below = 2 * np.cumsum(normal, axis=1) - normal  # twice those below, once those level
    pairs = normal[0].sum() * anomalous[0].sum()
    return np.asarray((half_below * anomalous).sum(axis=1) / (2 * pairs), dtype=np.float64)


def count_above(count: int, rate: float) -> int:
    """How many of ``count`` normal images a threshold may flag at a false-positive rate.

    >>> count_above(100, 0.29)  # 0.29 * 100 is 28.999999999999996
    29
    """
    return int(rate * count + 1e-9)


def threshold_at_false_positive_rate(normal_z: ArrayLike, rate: float = 0.05) -> float:
    """Smallest threshold that at most ``rate`` of the normal scores exceed.

    No score is interpolated, so the rate on ``normal_z`` itself never lies above ``rate``. A new
    normal image exceeds the threshold with a chance of at most ``rate + 1 / (n + 1)`` for n
    calibration images, if it comes from where they come from. ``normal_z`` must be of images that
    were used neither for training nor for testing.

    Raises:
        ValueError: fewer than ``1 / rate`` scores, which say nothing about so small a rate; a score
            that is not finite; a rate outside (0, 1).

    >>> threshold_at_false_positive_rate([-1.0, -0.5, 0.0, 0.5, 1.0], rate=0.2)
    0.5
    """
    scores = np.sort(_finite(normal_z, "normal_z"))
    if not 0 < rate < 1:
        raise ValueError(f"the false-positive rate is {rate}; it must lie between 0 and 1")
    above = count_above(len(scores), rate)
    if above == 0:
        raise ValueError(
            f"{len(scores)} normal scores are too few to calibrate a false-positive rate of "
            f"{rate:g}: it takes at least {int(np.ceil(1 / rate - 1e-9))}, or a higher rate"
        )
    return float(scores[len(scores) - above - 1])


def operating_point(labels: ArrayLike, z: ArrayLike, threshold: float) -> OperatingPoint:
    """Accuracy, F1 and the rest when every image with ``z > threshold`` is flagged.

    Raises:
        ValueError: as for ``image_auroc``, or a threshold that is not finite.

    >>> point = operating_point([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.8], threshold=0.5)
    >>> point.sensitivity, point.specificity
    (0.5, 0.5)
    """
    anomalous, scores = _checked(labels, z)
    if not np.isfinite(threshold):
        raise ValueError(f"the threshold is {threshold}; it must be a finite number")
    flagged = scores > threshold
    hits, alarms = int((flagged & anomalous).sum()), int(flagged.sum())
    positives = int(anomalous.sum())
    negatives = len(scores) - positives
    rejected = negatives - (alarms - hits)
    return OperatingPoint(
        threshold=float(threshold),
        accuracy=(hits + rejected) / len(scores),
        f1=2 * hits / (alarms + positives),
        precision=hits / alarms if alarms else 0.0,
        sensitivity=hits / positives,
        specificity=rejected / negatives,
    )


def best_test_accuracy(labels: ArrayLike, z: ArrayLike) -> OperatingPoint:
    """The paper's protocol: the threshold with the highest accuracy ON THESE VERY TEST LABELS.

    It is for comparison with published figures, and optimistic: no threshold that is fixed before
    the labels are known does better. Of several equally accurate thresholds the highest is chosen.
    Errors are those of ``image_auroc``.

    >>> best_test_accuracy([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.8]).accuracy
    0.75
    """
    anomalous, scores = _checked(labels, z)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    # Flagging the first i images is right for the anomalous among them and wrong for the rest.
    gain = np.concatenate([[0], np.cumsum(np.where(anomalous[order], 1, -1))])
    separable = np.concatenate([[True], ranked[1:] < ranked[:-1], [True]])
    flagged = int(np.argmax(np.where(separable, gain, gain.min() - 1)))
    # The threshold itself is not flagged, so the first image left out is the one to name.
    threshold = ranked[flagged] if flagged < len(ranked) else np.nextafter(ranked[-1], -np.inf)
    return operating_point(anomalous, scores, float(threshold))


def evaluate(
    labels: ArrayLike,
    z: ArrayLike,
    *,
    score_name: str,
    threshold: float | None = None,
    false_positive_rate: float | None = None,
    seed: int = 0,
) -> Evaluation:
    """All figures of one score; ``seed`` is that of the bootstrap.

    A ``threshold`` is one that ``threshold_at_false_positive_rate`` chose on other images, for
    ``false_positive_rate``.

    Raises:
        ValueError: as for ``image_auroc``, or a ``false_positive_rate`` without its ``threshold``.

    >>> found = evaluate([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.8], score_name="z", threshold=0.5)
    >>> found.auroc, found.calibrated.accuracy
    (0.75, 0.5)
    """
    if threshold is None and false_positive_rate is not None:
        raise ValueError(
            f"false_positive_rate is {false_positive_rate}, but there is no threshold that was "
            "calibrated for it: get one from threshold_at_false_positive_rate"
        )
    anomalous, scores = _checked(labels, z)
    return Evaluation(
        score_name=score_name,
        n_normal=int((~anomalous).sum()),
        n_anomalous=int(anomalous.sum()),
        auroc=image_auroc(anomalous, scores),
        auroc_interval=bootstrap_auroc_interval(anomalous, scores, seed=seed),
        auprc=image_auprc(anomalous, scores),
        paper_best_test_accuracy=best_test_accuracy(anomalous, scores),
        calibrated=None if threshold is None else operating_point(anomalous, scores, threshold),
        false_positive_rate=false_positive_rate,
    )


def plot_roc(path: str | PathLike[str], curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
    """Draw ROC curves of (labels, z) by name; the ending .png, .svg or .pdf chooses the format.

    Raises:
        ValueError: there are no curves, or ``image_auroc`` would refuse one, which is named.

    >>> plot_roc("roc.svg", {"z": ([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.8])})
    """
    if not curves:
        raise ValueError("there is no curve to draw; give at least one score with its labels")
    metrics = require("sklearn.metrics", "train")
    # Without pyplot: no window system, and no state between calls.
    figure = require("matplotlib.figure", "train").Figure(figsize=(5.6, 5.6), layout="constrained")
    axes = figure.add_subplot()
    for name, (labels, z) in curves.items():
        try:
            anomalous, scores = _checked(labels, z)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        false_positive_rate, sensitivity, _ = metrics.roc_curve(anomalous, scores)
        area = metrics.roc_auc_score(anomalous, scores)
        axes.plot(false_positive_rate, sensitivity, linewidth=1.8, label=f"{name}  {area:.3f}")
    chance = {"color": "0.6", "linestyle": (0, (4, 3)), "linewidth": 1, "zorder": 1}  # lowest
    axes.plot([0, 1], [0, 1], label="chance  0.500", **chance)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set(xlabel="false-positive rate (1 − specificity)", ylabel="sensitivity")
    axes.set(xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="AUROC", loc="lower right", alignment="left", framealpha=0.9, edgecolor="0.9")
    figure.savefig(path, dpi=150)


def _checked(labels: ArrayLike, z: ArrayLike) -> tuple[Bools, Floats]:
    """Labels as booleans and scores as float64, both checked."""
    scores = _finite(z, "z")
    given = np.asarray(labels)
    if given.shape != scores.shape:
        raise ValueError(
            f"labels have the shape {given.shape} and z has {scores.shape}; each image needs one "
            "label and one score"
        )
    if len(strange := given[~np.isin(given, (0, 1))]):
        raise ValueError(
            f"labels contain {strange[0]}; they must be 0 for normal and 1 for anomalous images"
        )
    anomalous = given.astype(bool)
    if anomalous.all() or not anomalous.any():
        present, missing = ("anomalous", "normal") if anomalous[0] else ("normal", "anomalous")
        raise ValueError(
            f"all {len(anomalous)} images are {present}: it takes at least one {missing} image "
            "to measure how well the two are told apart"
        )
    return anomalous, scores


def _finite(z: ArrayLike, name: str) -> Floats:
    scores = np.asarray(z, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"{name} has the shape {scores.shape}; it must hold one score per image")
    if not len(scores):
        raise ValueError(f"{name} is empty; there is no image to evaluate")
    if len(bad := np.flatnonzero(~np.isfinite(scores))):
        raise ValueError(
            f"{len(bad)} of {len(scores)} scores in {name} are not finite, the first at position "
            f"{bad[0]}: {scores[bad[0]]}"
        )
    return scores
