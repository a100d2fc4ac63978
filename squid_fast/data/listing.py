"""The image files in a folder, found alike for training and for screening."""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from ..utils.text import one_line, utf8_text
from .formats import IMAGE_SUFFIXES, is_image

Kind = Literal["file", "folder", "unlisted"]

_OF_THE_SYSTEM = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip
_INDEX = "DICOMDIR"  # a table of contents in the format of DICOM
_SHOWN = 6


class LeftOut:
    """The files in searched folders that are no images, each counted once.

    >>> left_out = LeftOut()
    >>> for path in ("a/notes.txt", "a/../a/notes.txt", "a/README", "a/b.txt"):
    ...     left_out.add(path)
    >>> left_out.keep("a/b.txt")  # which was asked for by its name
    >>> left_out.counts
    Counter({'.txt': 1, 'without suffix': 1})
    """

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}
        self._kept: set[str] = set()

    def add(self, path: str | os.PathLike[str], kind: str | None = None) -> None:
        """Count a file, as of a ``kind`` such as "masks", by default its suffix."""
        kind = kind or one_line(utf8_text(Path(path).suffix.lower())) or "without suffix"
        self._kinds.setdefault(os.path.abspath(path), sys.intern(kind))

    def keep(self, path: str) -> None:
        """Do not count a file, whether it was added or will be."""
        self._kept.add(os.path.abspath(path))

    @property
    def paths(self) -> list[str]:
        """Their absolute paths."""
        return [path for path in self._kinds if path not in self._kept]

    @property
    def counts(self) -> Counter[str]:
        """Number of files by kind."""
        return Counter(self._kinds[path] for path in self.paths)


def counted(left_out: Mapping[str, int]) -> str:
    """The numbers of a ``LeftOut`` as a sentence for people; nothing if nothing was left out.

    >>> counted({"without suffix": 1, ".txt": 7})
    '8 files are left out, being no images: 7 .txt, 1 without suffix'
    """
    if not left_out:
        return ""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds[:_SHOWN])
    others = f", {sum(count for _, count in kinds[_SHOWN:]):,} others" if kinds[_SHOWN:] else ""
    total = sum(left_out.values())
    files = f"{total:,} files are" if total > 1 else "1 file is"
    return f"{files} left out, being no images: {listed}{others}"


def images_in(
    folder: str, left_out: LeftOut | None = None, also: tuple[str, ...] = ()
) -> Iterator[tuple[str, Kind]]:
    """Yield the images in a folder and all folders in it, as (path, "file"), unsorted.

    A file with the suffix of an image is one, and of all others the content decides. A folder that
    cannot be listed comes as (path, "unlisted"), and one that is named like an image and holds no
    file as (path, "folder"). Hidden files and folders, and those that operating systems keep for
    themselves, are passed over. Links to folders are followed once, so loops end.

    Args:
        left_out: counts the files that are no images.
        also: further suffixes, in lower case, of files that are wanted.

    >>> for name, head in (("a.png", b""), ("scan", b"GIF89a"), ("notes.txt", b"")):
    ...     _ = Path(name).write_bytes(head)
    >>> left_out = LeftOut()
    >>> sorted(images_in(".", left_out)), left_out.counts
    ([('./a.png', 'file'), ('./scan', 'file')], Counter({'.txt': 1}))
    """
    wanted = (*IMAGE_SUFFIXES, *also)
    for path, kind in walk(folder):
        named = path.lower().endswith(wanted)
        if kind == "file":
            if named or _has_image(path):
                yield path, kind
            elif left_out is not None:
                left_out.add(path)
        elif kind == "unlisted" or (named and _is_without_files(path)):
            yield path, kind


def walk(root: str) -> Iterator[tuple[str, Kind]]:
    """Yield ``root`` and all in it that is not passed over, see ``images_in``.

    Links to folders come after all real folders. They are followed if they lead to a folder that
    was not searched yet and does not hold ``root``.
    """
    seen = set()
    above = real_root = os.path.realpath(root)
    while (parent := os.path.dirname(above)) != above:
        seen.add(parent)
        above = parent
    folders, links = [(root, real_root)], deque[str]()
    while folders or links:
        if folders:
            folder, real = folders.pop()
        else:
            folder = links.popleft()
            real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder or os.curdir) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            yield folder, "unlisted"
            continue
        yield folder, "folder"
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if is_passed_over(entry.name):
                continue
            if not _is_folder(entry):
                yield path, "file"
            elif entry.is_symlink():
                links.append(path)
            else:
                folders.append((path, os.path.join(real, entry.name)))


def is_passed_over(name: str) -> bool:
    """Whether a file or folder of this name is hidden or kept by an operating system for itself.

    >>> [name for name in ("a.png", "._a.png", "__MACOSX") if is_passed_over(name)]
    ['._a.png', '__MACOSX']
    """
    return name.startswith(".") or name.lower() in _OF_THE_SYSTEM


def _has_image(path: str) -> bool:
    if os.path.basename(path) == _INDEX or (os.path.exists(path) and not os.path.isfile(path)):
        return False  # to open a pipe could take for ever
    return is_image(Path(path))


def _is_without_files(folder: str) -> bool:
    return all(kind == "folder" for _, kind in walk(folder))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to nothing or to itself; reading it gives the error
        return False
