"""Result tables (Parquet, CSV, JSON lines) and running figures about the rows."""

from __future__ import annotations

import csv
import dataclasses
import heapq
import json
import logging
import math
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from squid_fast._extras import require
from squid_fast.screening.pipeline import PathInput, ScreenRow

COLUMNS = tuple(field.name for field in dataclasses.fields(ScreenRow))
"""path, raw_score, z_score, anomaly_score, flag, threshold, error"""

_QUANTILES = {"min": 0.0, "q05": 0.05, "median": 0.5, "q95": 0.95, "max": 1.0}
_log = logging.getLogger("squid_fast")


def open_writer(path: PathInput) -> ResultWriter:
    """Open a result table for writing, as a context manager.

    Its columns are `COLUMNS`; the suffix of ``path`` chooses the format:

    - ``.parquet``: strings, float64 and booleans; missing values are null.
    - ``.csv``: UTF-8 with a header; missing values are empty, flags ``true`` or ``false``.
    - ``.jsonl``: one JSON object in each line; missing values are null.

    Raises:
        ValueError: another suffix.
        IsADirectoryError: ``path`` is a directory.
        ImportError: Parquet without pyarrow.
        OSError: the table cannot be created there.
    """
    return ResultWriter(path)


class ResultWriter:
    r"""Writes rows to ``results.partial.csv`` and renames it to ``results.csv`` at the end.

    So ``results.csv`` is always whole: a table already there stays until the new one is
    finished. If the run ends with an exception, the rows so far stay in the partial file, whose
    name is logged as a warning. No partial file is overwritten by a later run; that one takes
    ``results.partial-2.csv``.

    Bytes of file names that are not UTF-8 are written as ``\xff``.

    Attributes:
        path: the table's final place.
        partial_path: where the rows are until the writer is closed without an exception.
    """

    def __init__(self, path: PathInput) -> None:
        self.path = Path(path)
        formats: dict[str, type[_Table]] = {
            ".parquet": _ParquetTable,
            ".csv": _CsvTable,
            ".jsonl": _JsonLinesTable,
        }
        make_table = formats.get(self.path.suffix.lower())
        if make_table is None:
            raise ValueError(
                f"results are written as {', '.join(formats)}; "
                f"{self.path.name!r} has the suffix {self.path.suffix!r}"
            )
        if self.path.is_dir():
            raise IsADirectoryError(f"{str(self.path)!r} is a directory, not a result file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial_path = _claim_partial(self.path)
        self._count = 0
        try:
            self._table = make_table(self.partial_path)
        except BaseException:
            self.partial_path.unlink(missing_ok=True)
            raise

    def write(self, rows: ScreenRow | Iterable[ScreenRow]) -> None:
        """Write one row or many; an iterator is consumed as a stream."""
        for row in [rows] if isinstance(rows, ScreenRow) else rows:
            self._table.write(row)
            self._count += 1

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._table.close()
            _sync(self.partial_path)
            if error is None:
                os.replace(self.partial_path, self.path)
        except BaseException:
            self._warn_of_partial()
            raise
        if error is not None:
            self._warn_of_partial()

    def _warn_of_partial(self) -> None:
        _log.warning(
            "%s was not finished; the %d rows so far are in %s",
            self.path.name,
            self._count,
            self.partial_path,
        )


class Summary:
    """Running figures about a stream of rows, and the few rows that a report shows.

    Memory: four bytes for each scored row, plus ``top_k`` rows, plus ``max_errors`` rows.

    Attributes:
        count: rows so far.
        flagged: rows whose z-score is above the threshold.
        errors: rows without a score.
        threshold: the rows' threshold; None before the first row.
        error_rows: the first ``max_errors`` rows without a score.
    """

    def __init__(self, top_k: int = 12, max_errors: int = 500) -> None:
        if top_k < 0 or max_errors < 0:
            raise ValueError(f"top_k ({top_k}) and max_errors ({max_errors}) cannot be negative")
        self.top_k = top_k
        self.max_errors = max_errors
        self.count = 0
        self.flagged = 0
        self.errors = 0
        self.threshold: float | None = None
        self.error_rows: list[ScreenRow] = []
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
        return [row for *_, row in sorted(self._top, key=lambda entry: entry[:2], reverse=True)]

    def add(self, row: ScreenRow) -> None:
        """Count one row."""
        self.count += 1
        self.threshold = row.threshold
        if row.error is not None or row.z_score is None:
            self.errors += 1
            if len(self.error_rows) < self.max_errors:
                self.error_rows.append(row)
            return
        self.flagged += bool(row.flag)
        self._z_scores.append(row.z_score)
        entry = (row.z_score, -self.count, row)  # counts differ, so rows are never compared
        if len(self._top) < self.top_k:
            heapq.heappush(self._top, entry)
        elif self.top_k:
            heapq.heappushpop(self._top, entry)

    def watch(self, rows: Iterable[ScreenRow]) -> Iterator[ScreenRow]:
        """Pass rows on, counting each."""
        for row in rows:
            self.add(row)
            yield row

    def as_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON.

        Keys: count, scored, flagged, errors, threshold, z_score. The last is None without a
        scored row, else a dict with min, q05, median, q95 and max.
        """
        z_scores = self.z_scores
        return {
            "count": self.count,
            "scored": self.scored,
            "flagged": self.flagged,
            "errors": self.errors,
            "threshold": _finite_or_none(self.threshold),
            "z_score": {key: float(np.quantile(z_scores, q)) for key, q in _QUANTILES.items()}
            if self.scored
            else None,
        }


def summarise(rows: Iterable[ScreenRow], top_k: int = 12, max_errors: int = 500) -> Summary:
    """Consume ``rows`` into a `Summary`."""
    summary = Summary(top_k, max_errors)
    for row in rows:
        summary.add(row)
    return summary


def utf8_text(text: str) -> str:
    r"""``text`` with what UTF-8 cannot hold spelled out, such as a file name's byte as ``\xff``."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


class _Table(Protocol):
    def __init__(self, path: Path) -> None: ...
    def write(self, row: ScreenRow) -> None: ...
    def close(self) -> None: ...


class _CsvTable:
    def __init__(self, path: Path) -> None:
        self._file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115 closed below
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(COLUMNS)

    def write(self, row: ScreenRow) -> None:
        values = _values(row)
        if row.flag is not None:
            values["flag"] = str(row.flag).lower()
        self._writer.writerow(values.values())

    def close(self) -> None:
        self._file.close()


class _JsonLinesTable:
    def __init__(self, path: Path) -> None:
        self._file = open(path, "w", encoding="utf-8", newline="\n")  # noqa: SIM115 closed below

    def write(self, row: ScreenRow) -> None:
        values = {
            name: _finite_or_none(value) if isinstance(value, float) else value
            for name, value in _values(row).items()  # JSON knows neither NaN nor infinity
        }
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _ParquetTable:
    rows_per_group = 16384

    def __init__(self, path: Path) -> None:
        self._arrow = require("pyarrow", "screen")
        parquet = require("pyarrow.parquet", "screen")
        text, number = self._arrow.string(), self._arrow.float64()
        self._schema = self._arrow.schema(
            [
                ("path", text),
                ("raw_score", number),
                ("z_score", number),
                ("anomaly_score", number),
                ("flag", self._arrow.bool_()),
                ("threshold", number),
                ("error", text),
            ]
        )
        self._rows: list[dict[str, Any]] = []
        self._writer = parquet.ParquetWriter(str(path), self._schema, compression="zstd")

    def write(self, row: ScreenRow) -> None:
        self._rows.append(_values(row))
        if len(self._rows) == self.rows_per_group:
            self._flush()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
            self._rows = []


def _values(row: ScreenRow) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in COLUMNS}
    values["path"] = utf8_text(row.path)
    values["error"] = None if row.error is None else utf8_text(row.error)
    return values


def _claim_partial(path: Path) -> Path:
    """Create and return the first free one of name.partial.csv, name.partial-2.csv, ..."""
    number = 1
    while True:
        mark = "partial" if number == 1 else f"partial-{number}"
        candidate = path.with_name(f"{path.stem}.{mark}{path.suffix}")
        try:
            candidate.touch(exist_ok=False)
            return candidate
        except FileExistsError:
            number += 1


def _sync(path: Path) -> None:
    """Have the file's content reach the disk before it gets its final name."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
