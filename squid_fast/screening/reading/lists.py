"""Lists of files: names in a text file, as ``find`` prints them, or in a CSV table."""

from __future__ import annotations

import os
import sys

from ...data.csv_files import Table, TableError
from ...data.formats import GZIP, HEAD_BYTES, image_format
from ...utils.text import decoded
from .files import PathInput, listed_file

# Parquet, Arrow, archives (XLSX among them), old Excel files, databases and documents.
_NO_TEXT = (b"PAR1", b"ARROW1", b"PK\x03\x04", GZIP, b"\xd0\xcf\x11\xe0", b"SQLite format", b"%PDF")


def read_list(path: PathInput, root: PathInput | None = None) -> list[str]:
    r"""Read the files that a list names, in its order, as inputs for ``screen`` and ``pack``.

    - A list is text with one name in each line, or with a NUL after each name, as ``find -print0``
      writes it; ``-`` is standard input. Blank lines are left out. It is UTF-8, or UTF-16 as
      PowerShell writes it. Bytes that are neither are kept as surrogates.
    - A list whose name ends in ``.csv`` or ``.tsv`` is a table with the column ``image_path``, or
      another of ``squid_fast.data.csv_files.PATH_COLUMNS``.

    A name stands for one file: no folder is searched and no pattern is expanded. It is relative to
    ``root``. One that leads out of ``root`` through ``..``, as an absolute path or by a symbolic
    link is not read and gets a row with an error from ``screen``, as folders and missing files do.

    Args:
        root: folder that holds the files, by default the folder of the list, or the current
            folder for standard input.

    Raises:
        OSError: the list cannot be read.
        TableError: a table is not CSV, or lacks the column ``image_path`` or a value in it.
        ValueError: the list is no text, such as Parquet or an image, or it is JSON.

    >>> with open("night.txt", "w") as file:
    ...     _ = file.write("a.png\nward 3/b.dcm\n")
    >>> read_list("night.txt", root="archive")
    ['archive/a.png', 'archive/ward 3/b.dcm']
    """
    path = os.fspath(path)
    if root is None:
        root = "" if path == "-" else os.path.dirname(path)
    if path == "-" and sys.stdin is None:
        raise ValueError("the list is -, but standard input is closed; name a file, or pipe a list")
    if path == "-":
        content = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            content = file.read()
    is_table = path.lower().endswith((".csv", ".tsv"))
    _check_text(content[:HEAD_BYTES], path)
    names = _column(content, path) if is_table else _lines(decoded(content))
    return [listed_file(name, os.fspath(root)) for name in names]


def _check_text(head: bytes, origin: str) -> None:
    first = decoded(head).lstrip().partition("\n")[0]
    what = "no text" if head.startswith(_NO_TEXT) or image_format(head) else ""
    if first.startswith(('{"', '["', "[{")) or first.strip() in ("{", "["):
        what = "JSON"
    if what:
        raise ValueError(
            f"the list {origin!r} is {what}; give text with one file per line, or a CSV table with "
            "a column image_path or path, such as the results of screen as .csv"
        )


def _lines(text: str) -> list[str]:
    if "\0" in text:
        return [name for name in text.split("\0") if name]
    # Not splitlines(): file names may hold the rarer separators that it knows.
    text = text.replace("\r\n", "\n")
    if "\n" not in text:
        text = text.replace("\r", "\n")
    return [name for name in text.split("\n") if name.strip()]


def _column(content: bytes, origin: str) -> list[str]:
    table = Table.parse(content, origin)
    column, names = table.path_column, []
    for number, row in table.rows():
        if not row.get(column, "").strip():
            raise TableError(f"{origin}, line {number} has no {column}")
        names.append(row[column])
    return names
