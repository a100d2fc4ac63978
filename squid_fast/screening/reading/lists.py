"""Lists of files: names in a text file, as ``find`` prints them, or in a CSV table."""

from __future__ import annotations

import csv
import io
import os
import sys

from ...utils.text import column_names
from .files import PathInput, listed_file

_COLUMN = "image_path"


def read_list(path: PathInput, root: PathInput | None = None) -> list[str]:
    r"""Read the files that a list names, in its order, as inputs for ``screen`` and ``pack``.

    - A list is text with one name in each line, or with a NUL after each name, as ``find -print0``
      writes it; ``-`` is standard input. Blank lines are left out. Bytes that are not UTF-8 are
      kept as surrogates.
    - A list whose name ends in ``.csv`` is a table, and its column ``image_path`` is read.

    A name stands for one file: no folder is searched and no pattern is expanded. It is relative to
    ``root``. One that leads out of ``root`` through ``..``, as an absolute path or by a symbolic
    link is not read and gets a row with an error from ``screen``, as folders and missing files do.

    Args:
        root: folder that holds the files, by default the folder of the list, or the current
            folder for standard input.

    Raises:
        OSError: the list cannot be read.
        ValueError: a table is not CSV, or lacks the column ``image_path`` or a value in it.

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
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    names = _column(text, path) if path.lower().endswith(".csv") else _lines(text)
    return [listed_file(name, os.fspath(root)) for name in names]


def _lines(text: str) -> list[str]:
    if "\0" in text:
        return [name for name in text.split("\0") if name]
    # Not splitlines(): file names may hold the rarer separators that it knows.
    return [name for name in text.replace("\r\n", "\n").split("\n") if name.strip()]


def _column(text: str, origin: str) -> list[str]:
    if "\0" in text:
        raise ValueError(f"{origin} holds NUL bytes, so it is no CSV")
    lines = csv.reader(io.StringIO(text, newline=""))
    names = []
    try:
        header = column_names(lines)
        if _COLUMN not in header:
            raise ValueError(
                f"{origin} lacks the column {_COLUMN}; it has {', '.join(header) or 'none'}"
            )
        column = header.index(_COLUMN)
        for row in lines:
            name = row[column].strip() if column < len(row) else ""
            if name:
                names.append(name)
            elif any(cell.strip() for cell in row):
                raise ValueError(f"{origin}, line {lines.line_num} has no {_COLUMN}")
    except csv.Error as error:
        raise ValueError(
            f"{origin}, line {lines.line_num} cannot be read as CSV: {error}"
        ) from error
    return names
