"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces ``path`` when the block ends.

    Until then, and after an exception, ``path`` stays as it was: the content goes to ``partial``,
    on the same file system, by default beside ``path``. It reaches the disk before the name does,
    so that a power cut leaves either the old file or the new one. A file that is replaced hands on
    its permissions; a symbolic link stays, and the file it leads to is replaced. A device or a pipe
    is written to as it is.

    >>> path = Path("notes.txt")
    >>> with replacing(path) as file:
    ...     (file.write(b"whole"), path.exists())
    (5, False)
    >>> path.read_text()
    'whole'
    """
    if is_special(path):
        with open(path, "wb") as file:
            yield file
        return
    path = destination(path)
    partial = partial or partial_of(path)
    try:
        with open(partial, "wb") as file:
            with suppress(OSError):  # a new file, or a file system without permissions
                shutil.copymode(path, partial)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def destination(path: str | os.PathLike[str]) -> Path:
    """The file that is written when ``path`` is: the one that a symbolic link leads to.

    It need not exist.

    Raises:
        OSError: links that lead to one another.

    >>> Path("latest.csv").symlink_to("monday.csv")
    >>> destination("latest.csv").name, destination("other.csv").name
    ('monday.csv', 'other.csv')
    """
    path = Path(path)
    if not path.is_symlink():
        return path
    place = Path(os.path.realpath(path))
    if place.is_symlink():
        raise OSError(f"{str(path)!r} is a symbolic link that leads back to itself; name a file")
    return place


def partial_of(path: Path) -> Path:
    """Where ``replacing`` collects the content of ``path`` unless told."""
    return path.with_name(path.name + ".new")


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether there is a device or a pipe at ``path``, which cannot be replaced by a file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


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
