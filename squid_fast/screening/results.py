"""Result tables: Parquet, CSV, JSON Lines."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..utils.atomic import replacing
from ..utils.extras import require
from ..utils.text import finite_or_none, utf8_text
from .pipeline import ScreenRow
from .reading.files import PathInput

COLUMNS = ("path", "raw_score", "z_score", "anomaly_score", "flag", "threshold", "error")
"""The columns of a result table, which are fields of ``ScreenRow``."""

_ROWS_AT_ONCE = 1 << 15  # rows of a Parquet row group, which are held in memory together

_LINE_ENDS = {ord(sign): f"\\u{ord(sign):04x}" for sign in "\x85\u2028\u2029"}

_Values = tuple[Any, ...]  # the values of one row, in the order of COLUMNS


def write_table(
    rows: Iterable[ScreenRow], path: PathInput, partial: PathInput | None = None
) -> None:
    r"""Write ``rows``, a stream of any length, as a table at ``path``, whole or not at all.

    The suffix of ``path`` chooses the format:

    - ``.parquet``: strings, float64 and booleans; missing values are null.
    - ``.csv``: UTF-8 with a header; missing values are empty, flags ``true`` or ``false``.
    - ``.jsonl``: one JSON object in each line; missing values are null.

    Bytes of file names that are not UTF-8 are written as ``\xff``.

    Args:
        partial: place of the table until it is whole, on the same file system; by default beside
            ``path``. A table already at ``path`` stays until then.

    Raises:
        ValueError: ``path`` has another suffix.
        ImportError: Parquet without pyarrow.
        OSError: the table cannot be written.

    >>> row = ScreenRow("a.png", 0.25, 1.5, 0.75, True, 1.0, None)
    >>> write_table([row], "results.csv")
    >>> Path("results.csv").read_text().splitlines()[1]
    'a.png,0.25,1.5,0.75,true,1.0,'
    """
    write = table_writer(path)
    with replacing(Path(path), None if partial is None else Path(partial)) as file:
        write(map(_values, rows), file)


def table_writer(path: PathInput) -> Callable[[Iterator[_Values], BinaryIO], None]:
    """Find the function that writes the format with the suffix of ``path``; see ``write_table``."""
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        formats = ", ".join(_WRITERS)
        raise ValueError(
            f"results are written as {formats}; {path.name!r} has the suffix {path.suffix!r}"
        )
    if writer is _write_parquet:
        require("pyarrow", "screen")
    return writer


def arrow_batch(rows: Iterable[ScreenRow]) -> Any:
    """Convert rows, at least one, to a ``pyarrow.RecordBatch`` as in a Parquet table."""
    return _record_batch(list(map(_values, rows)), _arrow_schema())


def _write_parquet(rows: Iterator[_Values], file: BinaryIO) -> None:
    parquet = require("pyarrow.parquet", "screen")
    schema = _arrow_schema()
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            writer.write_batch(_record_batch(group, schema))


def _arrow_schema() -> Any:
    arrow = require("pyarrow", "screen")
    text, number, truth = arrow.string(), arrow.float64(), arrow.bool_()
    types = (text, number, number, number, truth, number, text)
    return arrow.schema(list(zip(COLUMNS, types, strict=True)))


def _record_batch(rows: Sequence[_Values], schema: Any) -> Any:
    arrow = require("pyarrow", "screen")
    columns = zip(zip(*rows, strict=True), schema.types, strict=True)
    arrays = [arrow.array(column, of_type) for column, of_type in columns]
    return arrow.RecordBatch.from_arrays(arrays, schema=schema)


def _write_csv(rows: Iterator[_Values], file: BinaryIO) -> None:
    # Not pyarrow's writer, which puts the header and every text in quotes.
    writer = csv.writer(_Lines(file), lineterminator="\r\n")
    writer.writerow(COLUMNS)
    spelled = {True: "true", False: "false", None: None}
    for path, raw, z, anomaly, flag, threshold, error in rows:
        writer.writerow((path, raw, z, anomaly, spelled[flag], threshold, error))


class _Lines:
    r"""Takes lines that end in ``\r\n``, and writes them as UTF-8 with ``\n``.

    Before Python 3.11.9, the csv module puts a lone ``\r`` in quotes only if the ends of lines
    have one; without quotes it is read as the end of a line. macOS has files named so.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line.removesuffix("\r\n").encode() + b"\n")


def _write_json_lines(rows: Iterator[_Values], file: BinaryIO) -> None:
    encoder = json.JSONEncoder(ensure_ascii=False)  # json.dumps would create one for each row
    for row in rows:
        values = dict(zip(COLUMNS, row, strict=True))
        values["threshold"] = finite_or_none(values["threshold"])
        # Some readers end a line at more signs than JSON escapes.
        file.write((encoder.encode(values).translate(_LINE_ENDS) + "\n").encode())


_WRITERS = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_json_lines}


def _values(row: ScreenRow) -> _Values:
    path, *numbers, error = (getattr(row, name) for name in COLUMNS)
    return (utf8_text(path), *numbers, None if error is None else utf8_text(error))
