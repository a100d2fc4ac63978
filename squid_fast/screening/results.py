"""Result tables: Parquet, CSV, JSON lines."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from squid_fast._extras import require
from squid_fast.screening.files import PathInput
from squid_fast.screening.pipeline import ScreenRow
from squid_fast.screening.plain import finite_or_none, utf8_text

COLUMNS = tuple(field.name for field in dataclasses.fields(ScreenRow))
"""path, raw_score, z_score, anomaly_score, flag, threshold, error"""

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
            name: finite_or_none(value) if isinstance(value, float) else value
            for name, value in _values(row).items()
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
