"""Decoded images in Arrow files, so that screening them again need not decode them again.

A *shard* is a file in Arrow's IPC file format with one row for each image: ``path``, the bytes of
its name; ``image``, its pixels; ``error``, why there are none. Tools that know Arrow open it.
`pack` in `squid_fast.screening.reading.packing` writes shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...utils.extras import require
from .files import SHARD_SUFFIX, explain_no_file
from .pool import Decoded

FORMAT = 1
_MARK = b"squid_fast_shard"  # key of the format's version in the schema's metadata
_ARROW_MAGIC = b"ARROW1\0\0"


class ShardError(ValueError):
    """A file is no shard that can be read; the message says why."""


@dataclass(frozen=True)
class ShardHeader:
    """What the metadata of a shard's schema says, all of it known before the first row.

    Attributes:
        image_size: S of the images, uint8 [S, S].
        listing_sha256: of the files that were packed, all shards together.
        rows_per_shard: in every shard but the last.
        first_row: where the shard begins in the listing.
        rows: in this shard.
    """

    image_size: int
    listing_sha256: str
    rows_per_shard: int
    first_row: int
    rows: int

    def schema(self) -> Any:
        """The shard's Arrow schema, with all this in its metadata."""
        arrow = require("pyarrow", "screen")
        return arrow.schema(
            [
                # Bytes, because names of files need not be UTF-8.
                ("path", arrow.binary()),
                ("image", arrow.binary(self.image_size**2)),
                ("error", arrow.string()),
            ],
            {_MARK: str(FORMAT)} | {name: str(value) for name, value in asdict(self).items()},
        )


def is_shard(path: str) -> bool:
    """Whether a file is read as a shard, which its name tells: it ends in ``.arrow``."""
    return path.lower().endswith(SHARD_SUFFIX)


def count_rows(path: str) -> int:
    """How many rows `read_shard` gives: what the shard's head says, or one if it has none.

    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        with open_shard(path) as (header, _):
            return header.rows
    except ShardError:
        return 1


def read_shard(path: str, size: int) -> Iterator[Decoded]:
    """Yield the rows of a shard: an image's path, and its pixels or why there are none.

    Images are views, read-only, of the record batch that was read: uint8 [size, size], 255 = 1.0.
    Nothing is lost: a file that cannot be opened as a shard is one row with an error, under its
    own path. Where a shard breaks off, the rest of its rows are errors, under
    ``shard-00000.arrow#4096``, counted from 0. Images of another size than ``size`` are errors.

    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        with open_shard(path) as (header, batches):
            done, problem = 0, ""
            while done < header.rows and not problem:
                try:
                    rows = _rows(batches.read_next_batch(), header, path, size)
                except StopIteration:
                    problem = "the file ends there"
                except Exception as error:
                    problem = _one_line(error)
                else:
                    yield from rows[: header.rows - done]
                    done += len(rows)
            for row in range(done, header.rows):
                yield f"{path}#{row}", f"{path!r} is damaged from row {done} on: {problem}"
    except ShardError as error:
        yield path, str(error)


@contextmanager
def open_shard(path: str) -> Iterator[tuple[ShardHeader, Any]]:
    """A shard's head and the reader of its record batches, from the first on.

    Read as a stream, which the file format holds between its magic bytes and its footer: so the
    rows of a file that was cut short are read up to the cut. A memory map would spare a copy, but
    the process would be killed (SIGBUS) where a file becomes shorter while it is read.

    Raises:
        ShardError: it is no shard that can be read.
    """
    arrow = require("pyarrow", "screen")
    if problem := explain_no_file(path):
        raise ShardError(problem)
    if not os.path.isfile(path):
        what = "is no regular file" if os.path.exists(path) else "does not exist"
        raise ShardError(f"{path!r} {what}; a shard that squid-fast pack wrote is needed")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            magic = file.read(len(_ARROW_MAGIC))
            if magic != _ARROW_MAGIC:
                raise ShardError(f"{path!r} is no Arrow file; it begins with {magic!r}")
            reader = stack.enter_context(arrow.ipc.open_stream(file))
            header = _header(path, reader.schema)
        except ShardError:
            raise
        except Exception as error:  # Arrow raises many kinds on damaged files
            raise ShardError(f"{path!r} cannot be read as a shard: {_one_line(error)}") from error
        yield header, reader


def _header(path: str, schema: Any) -> ShardHeader:
    metadata = schema.metadata or {}
    if _MARK not in metadata:
        raise ShardError(
            f"{path!r} is an Arrow file that squid-fast pack did not write; it has the columns "
            f"{', '.join(schema.names) or 'none'}"
        )
    if metadata[_MARK] != str(FORMAT).encode():
        raise ShardError(
            f"{path!r} is a shard of format {metadata[_MARK].decode(errors='replace')}; this "
            f"version of squid_fast reads format {FORMAT}"
        )
    try:
        header = ShardHeader(
            image_size=int(metadata[b"image_size"]),
            listing_sha256=metadata[b"listing_sha256"].decode("ascii"),
            rows_per_shard=int(metadata[b"rows_per_shard"]),
            first_row=int(metadata[b"first_row"]),
            rows=int(metadata[b"rows"]),
        )
        if min(header.image_size, header.rows) < 1 or not schema.equals(
            header.schema(), check_metadata=True
        ):
            raise ValueError("its columns do not fit its image size")
    except (KeyError, ValueError) as error:
        raise ShardError(f"{path!r} has a damaged head: {_one_line(error)}") from error
    return header


def _rows(batch: Any, header: ShardHeader, path: str, size: int) -> list[Decoded]:
    """The rows of a record batch; pixels are views of its memory."""
    batch.validate(full=True)
    names, pixels, errors = batch.columns
    side = header.image_size
    if not pixels.is_null().equals(errors.is_valid()):
        raise ValueError("a row has to hold an image or an error")
    items: list[Any] = errors.to_pylist()
    if side != size:
        other = f"packed in {path!r} at {side}x{side}, and {size}x{size} is needed; pack it anew"
        items = [other if item is None else item for item in items]
    elif errors.null_count:
        flat = np.frombuffer(pixels.buffers()[1], np.uint8, len(batch) * side**2)
        images = flat.reshape(-1, side, side)
        items = [images[i] if item is None else item for i, item in enumerate(items)]
    return list(zip(map(os.fsdecode, names.to_pylist()), items, strict=True))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
