"""The images that a listing of files stands for, whether packed or not."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Generator
from contextlib import closing
from functools import cached_property

from .packing import count_rows, is_shard, read_shard
from .pool import TIMEOUT, read_ahead
from .worker import Decoded


class Source:
    """The images of a listing, numbered from 0: all those in a packed file, one for any other file.

    Args:
        paths: the listing, see ``find_files``, iterated several times. It may lie on the disk.

    >>> source = Source(["a.png", "b.png"])
    >>> [item.path for item in source.read(size=32, workers=0, first=1)]
    ['b.png']
    """

    def __init__(self, paths: Collection[str]) -> None:
        self.paths = paths

    @cached_property
    def packed(self) -> dict[int, int]:
        """Number of images in each packed file, by the file's index in ``paths``, ascending."""
        return {i: count_rows(path) for i, path in enumerate(self.paths) if is_shard(path)}

    def __len__(self) -> int:
        return len(self.paths) + sum(self.packed.values()) - len(self.packed)

    def read(
        self,
        size: int,
        workers: int | None = None,
        look_ahead: int | None = None,
        timeout: float = TIMEOUT,
        first: int = 0,
    ) -> Generator[Decoded, None, None]:
        """Yield the images from number ``first`` on, in order; see ``read_ahead``."""
        index, row = self._find(first)
        single = (path for path in itertools.islice(self.paths, index, None) if not is_shard(path))
        with closing(read_ahead(single, size, workers, look_ahead, timeout)) as images:
            for path in itertools.islice(self.paths, index, None):
                if is_shard(path):
                    yield from itertools.islice(read_shard(path, size), row, None)
                    row = 0
                else:
                    yield next(images)

    def _find(self, number: int) -> tuple[int, int]:
        """Find an image: the index of its file in ``paths``, and its place in that file."""
        index = number
        for packed, rows in self.packed.items():
            if index < packed:
                break
            if index < packed + rows:
                return packed, index - packed
            index -= rows - 1
        return index, 0
