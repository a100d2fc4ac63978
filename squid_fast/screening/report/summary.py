"""Running figures about the rows of a screening run."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ...utils.text import finite_or_none, utf8_text
from ..pipeline import ScreenRow
from .error_kinds import ErrorKind, ErrorKinds

_QUANTILES = {"min": 0.0, "q05": 0.05, "median": 0.5, "q95": 0.95, "max": 1.0}
_LISTED = 1000


class Summary:
    """Running figures about a stream of rows, and the few rows that a report shows.

    Memory: four bytes for each scored row, ``top_k`` or 1,000 rows, whichever is more, and those
    of `ErrorKinds`.

    Attributes:
        count: rows so far.
        flagged: rows whose z-score is above the threshold.
        errors: rows without a score.
        threshold: the rows' threshold; None before the first row.
    """

    def __init__(self, top_k: int = 12) -> None:
        if top_k < 0:
            raise ValueError(f"top_k is {top_k}; it cannot be negative")
        self.top_k = top_k
        self.count = 0
        self.flagged = 0
        self.errors = 0
        self.threshold: float | None = None
        self._error_kinds = ErrorKinds()
        self._z_scores = array("f")
        self._top: list[tuple[float, int, ScreenRow]] = []

    @property
    def scored(self) -> int:
        """Rows with a score."""
        return self.count - self.errors

    @property
    def z_scores(self) -> np.ndarray:
        """z-scores of all scored rows in their order, float32 [scored], a copy."""
        return np.array(self._z_scores, dtype=np.float32)

    @property
    def most_anomalous(self) -> list[ScreenRow]:
        """The ``top_k`` rows of greatest z-score, greatest first; among equals the earlier."""
        return self._ranked()[: self.top_k]

    @property
    def flagged_rows(self) -> list[ScreenRow]:
        """The 1,000 flagged rows of greatest z-score at most, in the same order."""
        return [row for row in self._ranked()[:_LISTED] if row.flag]

    @property
    def error_kinds(self) -> list[ErrorKind]:
        """The rows without a score by kind, the most frequent first."""
        return self._error_kinds.most_frequent_first()

    def add(self, row: ScreenRow) -> None:
        """Count one row."""
        self.count += 1
        self.threshold = row.threshold
        if row.error is not None or row.z_score is None:
            self.errors += 1
            self._error_kinds.add(row)
            return
        self.flagged += bool(row.flag)
        self._z_scores.append(row.z_score)
        entry = (row.z_score, -self.count, row)  # counts differ, so rows are never compared
        if len(self._top) < max(self.top_k, _LISTED):
            heapq.heappush(self._top, entry)
        else:
            heapq.heappushpop(self._top, entry)

    def watch(self, rows: Iterable[ScreenRow]) -> Iterator[ScreenRow]:
        """Pass rows on, counting each."""
        for row in rows:
            self.add(row)
            yield row

    def _ranked(self) -> list[ScreenRow]:
        return [row for *_, row in sorted(self._top, key=lambda entry: entry[:2], reverse=True)]

    def as_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON.

        Keys: count, scored, flagged, errors, threshold; z_score: None without a scored row, else
        a dict with min, q05, median, q95 and max; error_kinds: for each kind, the most frequent
        first, a dict with reason, count and example, the path of its first file.
        """
        z_scores = self.z_scores
        return {
            "count": self.count,
            "scored": self.scored,
            "flagged": self.flagged,
            "errors": self.errors,
            "threshold": finite_or_none(self.threshold),
            "z_score": {key: float(np.quantile(z_scores, q)) for key, q in _QUANTILES.items()}
            if self.scored
            else None,
            "error_kinds": [
                {
                    "reason": utf8_text(kind.reason),
                    "count": kind.count,
                    "example": utf8_text(kind.rows[0].path),
                }
                for kind in self.error_kinds
            ],
        }


def summarise(rows: Iterable[ScreenRow], top_k: int = 12) -> Summary:
    """Consume ``rows`` into a `Summary`."""
    summary = Summary(top_k)
    for row in rows:
        summary.add(row)
    return summary
