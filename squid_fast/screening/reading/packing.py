"""Decode files once and keep their images as shards."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ...utils.atomic import replacing
from ...utils.extras import require
from ...utils.text import utf8_text
from .files import SHARD_SUFFIX, PathInput, find_files
from .pool import TIMEOUT, Decoded, read_ahead
from .shards import ShardHeader, is_shard, open_shard

_BATCH_BYTES = 1 << 24  # of pixels in a record batch: 1,024 images of 128 x 128
_ROWS_PER_REPORT = 64


@dataclass(frozen=True)
class Packed:
    """What `pack` left in its folder.

    Attributes:
        files: rows in all shards.
        errors: those of them that hold an error and no image.
        shards: number of shards.
        bytes: size of all shards.
    """

    files: int
    errors: int
    shards: int
    bytes: int


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

    Images are uint8 [size, size], 255 = 1.0, in the order of `find_files`; a file that cannot be
    read becomes a row with an error. A shard has its name only once it is whole, so that whatever
    ends a run leaves whole shards. Shards that lie in ``out_folder`` are not packed themselves.

    Args:
        inputs: files, folders and globs, see `find_files`.
        out_folder: is made if it is missing.
        size: side of the images in pixels, that of the model that will screen them.
        rows_per_shard: images in each shard, fewer in the last.
        workers, timeout: see `read_ahead`.
        resume: go on in a folder that holds some shards of the same files.
        on_progress: called as ``on_progress(rows_done, rows_in_total)``.

    Raises:
        ValueError: a number is out of range, or ``resume`` finds shards of other files or of
            another size.
        FileExistsError: ``out_folder`` holds shards already, without ``resume``.
        ImportError: pyarrow is not installed.
        OSError: a shard cannot be written.
    """
    for name, value in (("size", size), ("rows_per_shard", rows_per_shard)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    folder = Path(out_folder)
    own = os.path.abspath(folder)
    files = [
        path
        for path in find_files(inputs)
        if not (is_shard(path) and os.path.dirname(os.path.abspath(path)) == own)
    ]
    plan = _plan(files, folder, size, rows_per_shard)
    errors = _errors_of_present(plan, folder, resume)
    missing = [path for path in plan if path not in errors]
    done = sum(plan[path].rows for path in errors)
    wanted = itertools.chain.from_iterable(
        files[plan[path].first_row : plan[path].first_row + plan[path].rows] for path in missing
    )
    folder.mkdir(parents=True, exist_ok=True)
    with closing(read_ahead(wanted, size, workers=workers, timeout=timeout)) as decoded:
        rows = _reporting(decoded, done, len(files), on_progress)
        for path in missing:
            errors[path] = _write_shard(path, plan[path], rows)
    return Packed(
        files=len(files),
        errors=sum(errors.values()),
        shards=len(plan),
        bytes=sum(path.stat().st_size for path in plan),
    )


def _plan(
    files: list[str], folder: Path, size: int, rows_per_shard: int
) -> dict[Path, ShardHeader]:
    """The shards that hold ``files``, with their heads."""
    listing = hashlib.sha256(b"".join(os.fsencode(path) + b"\0" for path in files)).hexdigest()
    return {
        folder / f"shard-{number:05d}{SHARD_SUFFIX}": ShardHeader(
            size, listing, rows_per_shard, first, min(rows_per_shard, len(files) - first)
        )
        for number, first in enumerate(range(0, len(files), rows_per_shard))
    }


def _errors_of_present(
    plan: dict[Path, ShardHeader], folder: Path, resume: bool
) -> dict[Path, int]:
    """The whole shards that are in ``folder`` already, with the number of errors in each."""
    present = sorted(folder.glob(f"shard-*{SHARD_SUFFIX}"))
    if present and not resume:
        raise FileExistsError(
            f"{folder} holds shards already; go on with them by resuming, or name another folder"
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
    """How many rows of a shard are errors; None if it is not whole, which its end tells."""
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
    """Write the next ``header.rows`` of ``rows``; the number of errors among them."""
    arrow = require("pyarrow", "screen")
    schema = header.schema()
    rows = itertools.islice(rows, header.rows)
    per_batch = max(1, _BATCH_BYTES // header.image_size**2)
    written = errors = 0
    with replacing(path) as file, arrow.ipc.new_file(file, schema) as writer:
        while batch := list(itertools.islice(rows, per_batch)):
            texts = [utf8_text(item) if isinstance(item, str) else None for _, item in batch]
            images = [None if isinstance(item, str) else item.tobytes() for _, item in batch]
            paths = [os.fsencode(name) for name, _ in batch]
            writer.write_batch(
                arrow.record_batch(
                    [
                        arrow.array(column, field.type)
                        for column, field in zip((paths, images, texts), schema, strict=True)
                    ],
                    schema=schema,
                )
            )
            written += len(batch)
            errors += len(batch) - texts.count(None)
        if written != header.rows:
            raise RuntimeError(f"{written} images were read for the {header.rows} of {path}")
    return errors
