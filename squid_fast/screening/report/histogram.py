"""The histogram of a report, as coordinates of a drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_BINS = 40


@dataclass(frozen=True)
class Bar:
    """One bin with images in it; lengths in the units of ``Histogram``."""

    left: float
    width: float
    height: float
    flagged: bool
    label: str


@dataclass(frozen=True)
class Histogram:
    """A drawing on a square of 100 x 100, y downwards; ticks are (position, text)."""

    bars: list[Bar]
    reference: str  # points of a polyline; empty without a reference
    threshold: float | None
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    outside: int


def draw_histogram(z: np.ndarray, threshold: float, reference: np.ndarray) -> Histogram:
    """Draw the histogram of z-scores, with an outline of the reference scores.

    The threshold is an edge of bins, so that a bar is flagged as a whole or not at all. Scores
    beyond the bulk are counted in the outermost bins.
    """
    z = z.astype(np.float64)
    anchor = threshold if math.isfinite(threshold) else 0.0
    bounds = [_bulk(values) for values in (z, reference) if values.size]
    low = min([anchor, *(bound[0] for bound in bounds)])
    high = max([anchor, *(bound[1] for bound in bounds)])
    step = _round_step((high - low or 1.0) / _BINS)
    first = min(-1, math.floor((low - anchor) / step))
    last = max(1, math.ceil((high - anchor) / step))
    bins = last - first
    counts = _count(z, anchor, step, first, last)
    outline = _count(reference, anchor, step, first, last) * (z.size / max(1, reference.size))
    top = max(counts.max(), outline.max()) * 1.06
    start = anchor + first * step

    def place(value: float) -> float:
        return (value - start) / (bins * step) * 100

    bars = [
        Bar(
            left=i / bins * 100,
            width=100 / bins,
            height=max(count / top * 100, 0.8),  # a single image must not vanish
            flagged=first + i >= 0 and math.isfinite(threshold),
            label=f"{start + i * step:.3g} to {start + (i + 1) * step:.3g}: {int(count):,}",
        )
        for i, count in enumerate(counts)
        if count
    ]
    points = [f"{(i + side) / bins * 100:.2f},{100 - y / top * 100:.2f}"
              for i, y in enumerate(outline) for side in (0, 1)]  # fmt: skip
    y_step = max(1.0, _round_step(top / 4))
    x_ticks = _ticks(start, start + bins * step, _round_step(bins * step / 10))
    return Histogram(
        bars=bars,
        reference=" ".join(points) if reference.size else "",
        threshold=place(threshold) if math.isfinite(threshold) else None,
        x_ticks=[(place(x), f"{x:g}".replace("-", "\N{MINUS SIGN}")) for x in x_ticks],
        y_ticks=[(y / top * 100, f"{y:,.0f}") for y in _ticks(0, top, y_step)],
        outside=int(((z <= start) | (z > start + bins * step)).sum()),
    )


def _count(values: np.ndarray, anchor: float, step: float, first: int, last: int) -> np.ndarray:
    """Values in each bin (anchor + i * step, anchor + (i + 1) * step], first <= i < last."""
    index = np.clip(np.ceil((values - anchor) / step) - 1, first, last - 1).astype(np.int64)
    return np.bincount(index - first, minlength=last - first)


def _bulk(values: np.ndarray) -> tuple[float, float]:
    """Range of the values within four interquartile ranges of the quartiles."""
    quarter, three_quarters = np.quantile(values, (0.25, 0.75))
    reach = 4 * (three_quarters - quarter)
    low, high = max(values.min(), quarter - reach), min(values.max(), three_quarters + reach)
    return float(low), float(high)


def _round_step(step: float) -> float:
    """The next greater of 1, 2, 2.5, 5 and 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
