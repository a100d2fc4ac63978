"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces ``path`` when the block ends.

    Until then, and after an exception, ``path`` stays as it was: the content goes to ``partial``,
    on the same file system, by default beside ``path``. It reaches the disk before the name does,
    so that a power cut leaves either the old file or the new one.

    >>> path = Path("notes.txt")
    >>> with replacing(path) as file:
    ...     (file.write(b"whole"), path.exists())
    (5, False)
    >>> path.read_text()
    'whole'
    """
    partial = partial or path.with_name(path.name + ".new")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def write_json(value: Any, path: Path) -> None:
    """Write ``value`` as JSON, whole or not at all.

    Raises:
        ValueError: ``value`` holds NaN or infinity, which JSON does not know.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, where the system can open folders for that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
