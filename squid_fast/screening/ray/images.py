"""Decoding on a cluster. Its tasks do not import torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...utils.extras import require
from ..reading.packing import arrow_columns
from ..reading.source import Source

if TYPE_CHECKING:
    from pyarrow import Table

arrow = require("pyarrow", "ray")

_ROWS_PER_BLOCK = 512
_COLUMNS = {"index": "int64", "path": "binary", "image": "binary", "error": "string"}
_SCHEMA = arrow.schema(list(_COLUMNS.items()))


def cut_listing(source: Source, per_part: int) -> Iterator[Table]:
    """Cut a listing into parts for ``decode``, each of at least ``per_part`` images but the last.

    A file is never cut, so that a part that ends with a packed file may have many more.

    Yields:
        Tables with the columns ``index``, the number of the file's first image; ``path``, bytes;
        ``rows``, the number of images in the file.
    """
    part: list[dict[str, Any]] = []
    number = 0
    for index, path in enumerate(source.paths):
        rows = source.packed.get(index, 1)
        part.append({"index": number, "path": os.fsencode(path), "rows": rows})
        number += rows
        if number - part[0]["index"] >= per_part:
            yield arrow.Table.from_pylist(part)
            part = []
    if part:
        yield arrow.Table.from_pylist(part)


def decode(part: Table, size: int, timeout: float, folder: str) -> Iterator[Table]:
    """Decode the images of ``part``, a table from ``cut_listing``, in one reader process.

    Relative paths start in ``folder``, which becomes the current folder.

    Yields:
        Numbers of images, names of files, uint8 pixels [size, size] or null, errors or null.

    Raises:
        ValueError: a packed file no longer holds as many images as when the files were listed.
    """
    first, total = part["index"][0].as_py(), sum(part["rows"].to_pylist())
    paths = list(map(os.fsdecode, part["path"].to_pylist()))
    if not all(map(os.path.isabs, paths)):
        os.chdir(folder)
    images = Source(paths).read(size, workers=1, timeout=timeout)
    numbered = zip(range(first, first + total), images, strict=True)
    while block := list(itertools.islice(numbered, _ROWS_PER_BLOCK)):
        numbers, items = zip(*block, strict=True)
        yield arrow.table({"index": numbers} | arrow_columns(items), _SCHEMA)
