"""What decodes on a cluster, see `screening.ray`. Its tasks have no need of torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ...utils.extras import require
from ..reading.pool import read_ahead
from ..reading.shards import count_rows, is_shard, read_shard

if TYPE_CHECKING:
    from pyarrow import Table

arrow = require("pyarrow", "ray")

_ROWS_PER_BLOCK = 512


def cut_listing(files: Iterable[str], per_part: int) -> Iterator[Table]:
    """Cut a listing into parts for `decode`: ``per_part`` files, fewer at an end, or one shard.

    Yields:
        Tables with the columns ``index``, the place of the file's first row among all rows;
        ``path``, bytes; ``rows``.
    """
    place = 0
    part: list[dict[str, Any]] = []
    for path in files:
        shard = is_shard(path)
        if part and (shard or len(part) == per_part):
            yield arrow.Table.from_pylist(part)
            part = []
        rows = count_rows(path) if shard else 1
        part.append({"index": place, "path": os.fsencode(path), "rows": rows})
        place += rows
        if shard:
            yield arrow.Table.from_pylist(part)
            part = []
    if part:
        yield arrow.Table.from_pylist(part)


def decode(part: Table, size: int, timeout: float, folder: str) -> Iterator[Table]:
    """The images of a part of the listing, in one reader process.

    Args:
        part: of `cut_listing`.
        size: side of the images.
        timeout: seconds after which a file is given up.
        folder: in which relative paths start; the current one from then on.

    Yields:
        Tables with the columns ``index``, the row's place among all rows; ``path``, bytes;
        ``image``, size x size bytes of a uint8 image or null; ``error``, text or null.

    Raises:
        ValueError: a shard has no longer the rows that it had when the files were listed.
    """
    place, total = part["index"][0].as_py(), sum(part["rows"].to_pylist())
    paths = list(map(os.fsdecode, part["path"].to_pylist()))
    if not all(map(os.path.isabs, paths)):
        os.chdir(folder)
    if is_shard(paths[0]):
        images = read_shard(paths[0], size)
    else:
        images = read_ahead(paths, size, workers=1, timeout=timeout)
    rows = zip(range(place, place + total), images, strict=True)
    while block := list(itertools.islice(rows, _ROWS_PER_BLOCK)):
        texts = [item if isinstance(item, str) else None for _, (_, item) in block]
        pixels = [None if isinstance(item, str) else item.tobytes() for _, (_, item) in block]
        yield arrow.table(
            {
                "index": arrow.array([index for index, _ in block], arrow.int64()),
                "path": arrow.array([os.fsencode(path) for _, (path, _) in block]),
                "image": arrow.array(pixels, arrow.binary()),
                "error": arrow.array(texts, arrow.string()),
            }
        )
