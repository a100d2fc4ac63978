"""Running figures about the rows of a screening run, and its errors by kind."""

from __future__ import annotations

import heapq
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...utils.text import finite_or_none, one_line, utf8_text
from ..pipeline import ScreenRow

_QUANTILES = {"min": 0.0, "q05": 0.05, "median": 0.5, "q95": 0.95, "max": 1.0}
_LISTED = 1000
_MAX_KINDS = 50  # of errors, and one more for all others
_MAX_FAILED = 100  # rows kept of each kind
_MAX_REASON = 500  # characters
_OTHER = "other reasons"


@dataclass
class ErrorKind:
    """Errors that differ only in the file and what is particular to it."""

    reason: str  # the sentence without the file's path; … stands for what differs
    count: int = 0
    rows: list[ScreenRow] = field(default_factory=list)  # the first 100


class Summary:
    """Running figures about a stream of rows, and the few rows that a report shows.

    It holds four bytes for each scored row, the ``top_k`` or 1,000 rows of greatest z-score,
    whichever is more, and 100 rows for each of at most 51 kinds of errors.

    Attributes:
        count: number of rows so far, ``errors`` of them without a score.
        flagged: number of rows whose z-score is above the threshold.
        threshold: the threshold of the rows; None before the first row.
        left_out: number of files in searched folders that are no images and have no row, by kind.

    >>> summary = Summary(top_k=1)
    >>> for path, z in {"a.png": 0.5, "b.png": 2.5}.items():
    ...     summary.add(ScreenRow(path, z, z, 0.5, z > 1.64, threshold=1.64, error=None))
    >>> summary.scored, summary.flagged, summary.most_anomalous[0].path
    (2, 1, 'b.png')
    """

    def __init__(self, top_k: int = 12) -> None:
        if top_k < 0:
            raise ValueError(f"top_k is {top_k}; it cannot be negative")
        self.top_k = top_k
        self.count = 0
        self.flagged = 0
        self.errors = 0
        self.threshold: float | None = None
        self.left_out: Mapping[str, int] = {}
        self._error_kinds: dict[str, ErrorKind] = {}
        self._z_scores = array("f")
        self._top: list[tuple[float, int, ScreenRow]] = []

    @property
    def scored(self) -> int:
        """Number of rows with a score."""
        return self.count - self.errors

    @property
    def z_scores(self) -> np.ndarray:
        """The z-scores of all scored rows in their order, float32 [scored], as a copy."""
        return np.array(self._z_scores, dtype=np.float32)

    @property
    def most_anomalous(self) -> list[ScreenRow]:
        """The ``top_k`` rows of greatest z-score, greatest first and equals in their order."""
        return self._ranked()[: self.top_k]

    @property
    def flagged_rows(self) -> list[ScreenRow]:
        """At most 1,000 flagged rows of greatest z-score, in the same order."""
        return [row for row in self._ranked()[:_LISTED] if row.flag]

    @property
    def error_kinds(self) -> list[ErrorKind]:
        """The rows without a score by kind, the most frequent first and equals in their order."""
        return sorted(self._error_kinds.values(), key=lambda kind: -kind.count)

    def add(self, row: ScreenRow) -> None:
        """Count one row."""
        self.count += 1
        self.threshold = row.threshold
        if row.error is not None or row.z_score is None:
            self.errors += 1
            self._add_error(row)
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

    def _add_error(self, row: ScreenRow) -> None:
        reason = _without_path(row.error or "", row.path)[:_MAX_REASON]
        key = row.error_kind or reason
        if key not in self._error_kinds and len(self._error_kinds) >= _MAX_KINDS:
            key = reason = _OTHER
        kind = self._error_kinds.setdefault(key, ErrorKind(reason))
        if kind.reason != reason:
            kind.reason = key
        kind.count += 1
        if len(kind.rows) < _MAX_FAILED:
            kind.rows.append(row)

    def _ranked(self) -> list[ScreenRow]:
        return [row for *_, row in sorted(self._top, key=lambda entry: entry[:2], reverse=True)]

    def as_dict(self) -> dict[str, Any]:
        """The figures as a dict for JSON.

        Its keys are count, scored, flagged, errors and threshold; left_out, the number of files
        that are no images, by kind; z_score, a dict with min, q05, median, q95 and max, or None
        without a scored row; and error_kinds, the most frequent first, a list of dicts: reason,
        count, and example, the path of the first file.
        """
        z = self.z_scores
        quantiles = {key: float(np.quantile(z, q)) for key, q in _QUANTILES.items() if z.size}
        kinds = [
            {"reason": utf8_text(k.reason), "count": k.count, "example": utf8_text(k.rows[0].path)}
            for k in self.error_kinds
        ]
        return {
            "count": self.count,
            "scored": self.scored,
            "flagged": self.flagged,
            "errors": self.errors,
            "threshold": finite_or_none(self.threshold),
            "left_out": dict(self.left_out),
            "z_score": quantiles or None,
            "error_kinds": kinds,
        }


def summarise(rows: Iterable[ScreenRow], top_k: int = 12) -> Summary:
    """Consume ``rows`` into a ``Summary``.

    >>> errors = {"a.png": "a.png is empty", "b.png": "b.png is empty"}
    >>> rows = [ScreenRow(path, None, None, None, None, 1.64, errors[path]) for path in errors]
    >>> summarise(rows).as_dict()["error_kinds"]
    [{'reason': 'the file is empty', 'count': 2, 'example': 'a.png'}]
    """
    summary = Summary(top_k)
    for row in rows:
        summary.add(row)
    return summary


def _without_path(error: str, path: str) -> str:
    """The sentence with "the file" where its path first is, or with nothing if a colon follows."""
    found = []
    for name in (os.path.abspath(path), path):
        for spelled in filter(None, (repr(name), name, one_line(name))):
            before, spelled, after = error.partition(spelled)
            if spelled and not (before[-1:].isalnum() or after[:1].isalnum()):
                found.append((len(before), len(after), f"{before}the file{after}"))
    return min(found)[-1].removeprefix("the file: ") if found else error
