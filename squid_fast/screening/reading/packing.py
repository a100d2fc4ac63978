"""Packed images: decoded once and kept in Arrow files, so that they need not be decoded again.

A *shard* is a file in Arrow's IPC file format with one row for each image: ``path``, the bytes of
its name; ``image``, its pixels; ``error``, why there are none.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...data.listing import LeftOut
from ...data.pixels import ImageReadError
from ...utils.atomic import replacing
from ...utils.extras import require
from ...utils.outputs import check_folder
from ...utils.text import utf8_text
from .files import PACKED_SUFFIX, PathInput, check_is_file, find_files
from .pool import TIMEOUT, check_reading, read_ahead
from .worker import Decoded

_FORMAT = 1
_MARK = b"squid_fast_shard"  # key of the format's version in the schema's metadata
_KINDS = b"error_kinds"  # key of a JSON list in the metadata of a record batch
_ARROW_MAGIC = b"ARROW1\0\0"
_BATCH_BYTES = 1 << 24  # of pixels in a record batch: 1,024 images of 128 x 128
_ROWS_PER_REPORT = 64


@dataclass(frozen=True)
class ShardHeader:
    """The metadata of a shard's schema, all of it known before the first row is written.

    Attributes:
        image_size: side S of the images, uint8 [S, S].
        listing_sha256: hash of the names of all files that were packed together.
        rows_per_shard: number of rows in every shard but the last; ``rows`` are in this one.
        first_row: place of the shard's first row in the listing.
    """

    image_size: int
    listing_sha256: str
    rows_per_shard: int
    first_row: int
    rows: int

    def schema(self) -> Any:
        """The shard's Arrow schema, with all this in its metadata."""
        arrow = require("pyarrow", "screen")
        image = arrow.binary(self.image_size**2)
        metadata = {_MARK: str(_FORMAT)} | {key: str(value) for key, value in asdict(self).items()}
        columns = [("path", arrow.binary()), ("image", image), ("error", arrow.string())]
        return arrow.schema(columns, metadata)


@dataclass(frozen=True)
class Packed:
    """What ``pack`` wrote: a row for each file, ``errors`` of which hold no image; size in bytes.

    ``left_out`` counts the files in searched folders that are no images, by kind.

    >>> Packed(files=1000, errors=2, shards=1, bytes=16_800_000).errors
    2
    """

    files: int
    errors: int
    shards: int
    bytes: int
    left_out: Mapping[str, int] = field(default_factory=dict)


def pack(
    inputs: PathInput | Iterable[PathInput],
    out_folder: PathInput,
    size: int,
    *,
    rows_per_shard: int = 8192,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Decode every image in ``inputs`` and write them to ``shard-00000.arrow`` and so on.

    Images are uint8 [size, size], 255 = 1.0, in the order of ``find_files``; a file that cannot be
    read becomes a row with an error. A shard gets its name once it is complete.

    Args:
        inputs, workers, timeout: see ``screen``.
        out_folder: folder for the shards, made if it is missing.
        size: side of the images in pixels, that of the model that will screen them.
        rows_per_shard: number of images in each shard; the last may have fewer.
        resume: continue in a folder that holds some shards of the same files, and keep those.
        on_progress: called as ``on_progress(rows_done, rows_in_total)``.

    Raises:
        ValueError: a number is out of range, or ``resume`` finds shards of other files or of
            another size.
        FileExistsError: ``out_folder`` holds shards already, and ``resume`` is not set.
        ImportError: pyarrow is not installed.
        OSError: a shard cannot be written.

    >>> np.save("scan.npy", np.zeros((40, 30), dtype=np.uint8))
    >>> packed = pack(["scan.npy", "missing.png"], "packed", size=32, workers=0)
    >>> packed.files, packed.errors, os.listdir("packed")
    (2, 1, ['shard-00000.arrow'])
    """
    for name, value, most in (("size", size, 1 << 14), ("rows_per_shard", rows_per_shard, 1 << 31)):
        if not 1 <= value <= most:
            least = "at least 1" if value < 1 else f"at most {most}"
            raise ValueError(f"{name} must be {least}, not {value}")
    folder = Path(out_folder)
    check_folder(folder)
    check_reading(workers, timeout)
    own = os.path.realpath(folder)
    left_out = LeftOut()
    files = [
        path
        for path in find_files(inputs, left_out)
        if not (is_shard(path) and os.path.realpath(os.path.dirname(path)) == own)
    ]
    plan = _plan(files, folder, size, rows_per_shard)
    errors = _errors_of_present(plan, folder, resume)
    missing = [path for path in plan if path not in errors]
    done = sum(plan[path].rows for path in errors)
    parts = (plan[path] for path in missing)
    wanted = (file for part in parts for file in files[part.first_row : part.first_row + part.rows])
    folder.mkdir(parents=True, exist_ok=True)
    with closing(read_ahead(wanted, size, workers=workers, timeout=timeout)) as decoded:
        rows = _reporting(decoded, done, len(files), on_progress)
        for path in missing:
            errors[path] = _write_shard(path, plan[path], rows)
    size_of_all = sum(path.stat().st_size for path in plan)
    return Packed(len(files), sum(errors.values()), len(plan), size_of_all, left_out.counts)


def _plan(
    files: list[str], folder: Path, size: int, rows_per_shard: int
) -> dict[Path, ShardHeader]:
    listing = hashlib.sha256(b"".join(os.fsencode(path) + b"\0" for path in files)).hexdigest()
    return {
        folder / f"shard-{number:05d}{PACKED_SUFFIX}": ShardHeader(
            size, listing, rows_per_shard, first, min(rows_per_shard, len(files) - first)
        )
        for number, first in enumerate(range(0, len(files), rows_per_shard))
    }


def _errors_of_present(
    plan: dict[Path, ShardHeader], folder: Path, resume: bool
) -> dict[Path, int]:
    """Find the complete shards in ``folder``, with the number of errors in each."""
    present = sorted(folder.glob(f"shard-*{PACKED_SUFFIX}"))
    if present and not resume:
        raise FileExistsError(
            f"{folder} holds shards already; resume to continue with them, or name another folder"
        )
    errors = {}
    for path in present:
        with open_shard(str(path)) as (header, _):
            if header != plan.get(path):
                raise ValueError(_difference(path, header, next(iter(plan.values()), None)))
        count = _count_errors(path)
        if count is not None:
            errors[path] = count
    return errors


def _difference(path: Path, there: ShardHeader, planned: ShardHeader | None) -> str:
    if planned is not None:
        for name in ("image_size", "rows_per_shard"):
            old, new = getattr(there, name), getattr(planned, name)
            if old != new:
                return f"{path} was packed with {name} {old}, not {new}; resume with {old}"
    return f"{path} was packed from another listing of files; name another folder for these"


def _count_errors(path: Path) -> int | None:
    """Count the rows of a shard that are errors; None if it is cut off, as its end shows."""
    arrow = require("pyarrow", "screen")
    try:
        with open(path, "rb") as file:
            errors_only = arrow.ipc.IpcReadOptions(included_fields=[2])
            reader = arrow.ipc.open_file(file, options=errors_only)
            batches = map(reader.get_batch, range(reader.num_record_batches))
            return sum(len(batch) - batch.column("error").null_count for batch in batches)
    except (arrow.ArrowException, OSError):
        return None


def _reporting(
    rows: Iterable[Decoded], done: int, total: int, on_progress: Callable[[int, int], None] | None
) -> Iterator[Decoded]:
    for row in rows:
        done += 1
        if on_progress is not None and (done % _ROWS_PER_REPORT == 0 or done == total):
            on_progress(done, total)
        yield row


def _write_shard(path: Path, header: ShardHeader, rows: Iterator[Decoded]) -> int:
    """Write the next ``header.rows`` of ``rows``; returns the number of errors among them."""
    arrow = require("pyarrow", "screen")
    schema = header.schema()
    rows = itertools.islice(rows, header.rows)
    per_batch = max(1, _BATCH_BYTES // header.image_size**2)
    written = errors = 0
    with replacing(path) as file, arrow.ipc.new_file(file, schema) as writer:
        while batch := list(itertools.islice(rows, per_batch)):
            kinds = [item.error_kind for item in batch if item.error is not None]
            metadata = {_KINDS: json.dumps(kinds)} if kinds else None
            writer.write_batch(arrow.record_batch(arrow_columns(batch), schema), metadata)
            written += len(batch)
            errors += len(kinds)
        if written != header.rows:
            raise RuntimeError(f"{written} images were read for the {header.rows} of {path}")
    return errors


def arrow_columns(items: Sequence[Decoded]) -> dict[str, list[Any]]:
    """Columns for Arrow: names of files and pixels as bytes, errors as text that is UTF-8."""
    return {
        "path": [os.fsencode(item.path) for item in items],
        "image": [None if item.image is None else item.image.tobytes() for item in items],
        "error": [None if item.error is None else utf8_text(item.error) for item in items],
    }


def is_shard(path: str) -> bool:
    """Whether a file is read as a shard: its name ends in ``.arrow``."""
    return path.lower().endswith(PACKED_SUFFIX)


def count_rows(path: str) -> int:
    """Number of rows that ``read_shard`` gives: as the header says, or one without a header."""
    try:
        with open_shard(path) as (header, _):
            return header.rows
    except ImageReadError:
        return 1


def read_shard(path: str, size: int) -> Iterator[Decoded]:
    """Yield the rows of a shard, as many as ``count_rows`` says.

    Images are read-only views of the record batch that was read: uint8 [size, size], 255 = 1.0. A
    file that is not a shard gives one row with an error, under its own path. If a shard breaks off,
    the remaining rows are errors, named ``shard-00000.arrow#4096`` by their number in the shard.
    Images of another size are errors.
    """
    try:
        with open_shard(path) as (header, batches):
            done = 0
            while done < header.rows:
                try:
                    batch, metadata = batches.read_next_batch_with_custom_metadata()
                    rows = _rows(batch, metadata or {}, header, path, size)
                except Exception as error:
                    ends = isinstance(error, StopIteration)
                    reason = "the file ends there" if ends else f"{type(error).__name__}: {{error}}"
                    message = f"is damaged from row {{row}} on: {reason}"
                    damaged = _shard_error(message, path, row=done, error=error)
                    rows = [
                        Decoded.failed(f"{path}#{row}", damaged) for row in range(done, header.rows)
                    ]
                yield from rows[: header.rows - done]
                done += len(rows)
    except ImageReadError as error:
        yield Decoded.failed(path, error)


@contextmanager
def open_shard(path: str) -> Iterator[tuple[ShardHeader, Any]]:
    """Open a shard: its header, and a reader of its record batches.

    The file is read as a stream, which the format holds between its magic bytes and its footer, so
    that a file that was cut off is read up to the cut. A memory map would spare a copy, but kill
    the process (SIGBUS) if the file became shorter meanwhile.

    Raises:
        ImageReadError: the file is not a shard that can be read.
    """
    arrow = require("pyarrow", "screen")
    check_is_file(path)
    if not os.path.isfile(path):
        what = "is no regular file" if os.path.exists(path) else "does not exist"
        raise _shard_error(f"{what}; a shard that squid-fast pack wrote is needed", path)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            magic = file.read(len(_ARROW_MAGIC))
            if magic != _ARROW_MAGIC:
                raise _shard_error("is no Arrow file; it begins with {magic}", path, magic=magic)
            reader = stack.enter_context(arrow.ipc.open_stream(file))
            header = _header(path, reader.schema)
        except ImageReadError:
            raise
        except Exception as error:  # Arrow raises many kinds on damaged files
            problem = f"cannot be read as a shard: {type(error).__name__}: {{error}}"
            raise _shard_error(problem, path, error=error) from error
        yield header, reader


def _header(path: str, schema: Any) -> ShardHeader:
    metadata = schema.metadata or {}
    if _MARK not in metadata:
        raise _shard_error(
            "is an Arrow file that squid-fast pack did not write; it has the columns {columns}",
            path,
            columns=", ".join(schema.names) or "none",
        )
    if metadata[_MARK] != str(_FORMAT).encode():
        raise _shard_error(
            f"is a shard of format {{format}}; this version of squid_fast reads format {_FORMAT}",
            path,
            format=metadata[_MARK].decode(errors="replace"),
        )
    try:
        listing = metadata[b"listing_sha256"].decode("ascii")
        names = (b"image_size", b"rows_per_shard", b"first_row", b"rows")
        side, rows_per_shard, first_row, rows = (int(metadata[name]) for name in names)
        header = ShardHeader(side, listing, rows_per_shard, first_row, rows)
        if min(side, rows) < 1 or not schema.equals(header.schema(), check_metadata=True):
            raise ValueError("its columns do not fit its image size")
    except (KeyError, ValueError) as error:
        problem = f"has a damaged head: {type(error).__name__}: {{error}}"
        raise _shard_error(problem, path, error=error) from error
    return header


def _shard_error(problem: str, path: str, **details: object) -> ImageReadError:
    return ImageReadError(f"{{path}} {problem}", path=repr(path), **details)


def _rows(
    batch: Any, metadata: Mapping[bytes, bytes], header: ShardHeader, path: str, size: int
) -> list[Decoded]:
    batch.validate(full=True)
    names, pixels, errors = batch.columns
    side = header.image_size
    if not pixels.is_null().equals(errors.is_valid()):
        raise ValueError("a row has to hold an image or an error")
    kinds = iter([str(kind) for kind in json.loads(metadata.get(_KINDS, b"[]"))])
    other_size = ImageReadError(
        f"packed in {{shard}} at {side}x{side}, and {size}x{size} is needed; pack it anew",
        shard=repr(path),
    )
    images = None
    if side == size and errors.null_count:
        images = np.frombuffer(pixels.buffers()[1], np.uint8, len(batch) * side**2)
        images = images.reshape(-1, side, side)
    rows = []
    for row, (name, error) in enumerate(zip(names.to_pylist(), errors.to_pylist(), strict=True)):
        packed_path = os.fsdecode(name)
        if error is not None:
            rows.append(Decoded(packed_path, None, error, next(kinds, None)))
        elif images is None:
            rows.append(Decoded.failed(packed_path, other_size))
        else:
            rows.append(Decoded(packed_path, images[row]))
    return rows
