"""Find the files that the names, folders and globs of a command line stand for."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator

from ...data.listing import LeftOut, images_in, walk
from ...data.pixels import ImageReadError
from ...utils.text import spellings

PathInput = str | os.PathLike[str]

PACKED_SUFFIX = ".arrow"
"""Suffix of files that hold packed images, see ``squid_fast.screening.reading.packing``."""

_LISTED = f"{os.sep}.{os.sep}.{os.sep}"


def find_files(
    inputs: PathInput | Iterable[PathInput], left_out: LeftOut | None = None
) -> list[str]:
    """List the files that ``inputs`` name, each once, in the order given.

    - A file is kept as it is named, whatever its suffix and whether it exists or not.
    - A folder is searched with all folders in it for images and packed images, sorted by path, see
      ``squid_fast.data.listing.images_in``. A folder that gives no file is kept itself. So is a
      folder in it that cannot be listed, or that is named like an image and holds no file.
    - A glob gives what it matches, sorted; ``**`` matches any number of folders. Folders that it
      matches are searched. A glob without a match is kept itself.

    Whatever is kept and cannot be read gets a row with an error from ``screen``. Hidden files and
    folders are left out unless they are named. Links to folders are followed once, so loops end.
    ``left_out`` counts the files in folders that are no images.

    >>> for name in ("b.png", "a.dcm", "notes.txt"):
    ...     open(name, "w").close()
    >>> find_files([".", "missing.png", "b.png"])
    ['./a.dcm', './b.png', 'missing.png']
    """
    found: dict[str, str] = {}
    for *_, path in sorted(search_files(as_paths(inputs), left_out)):
        found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def search_files(
    names: Iterable[str], left_out: LeftOut | None = None
) -> Iterator[tuple[int, str, str]]:
    """Yield the files of ``find_files`` as they are found, unsorted, and some of them repeatedly.

    A file comes as (index of its name in ``names``, match of a glob, path): sorted and each once,
    these are what ``find_files`` returns, which holds all of them in memory.
    """
    for index, name in enumerate(names):
        for match, path in _expand(name, left_out):
            yield index, match, path


def as_paths(inputs: PathInput | Iterable[PathInput]) -> list[str]:
    """Inputs as a list of strings, whether one path was given or several."""
    given = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    return [os.fspath(item) for item in given]


def listed_file(name: str, root: str) -> str:
    """Turn a name in a list into a path for ``find_files``: a file inside ``root``.

    A name that leads out of ``root``, a folder, and a missing file whose name looks like a pattern
    become ``ROOT/././NAME``, which ``find_files`` keeps as it is and ``check_is_file`` refuses.
    """
    likely = [os.path.normpath(spelled) for spelled in spellings(name)]
    there = (spelled for spelled in likely if os.path.lexists(os.path.join(root, spelled)))
    name = next(there, likely[0])
    path = os.path.join(root, name)
    pattern = glob.has_magic(path) and not os.path.lexists(path)
    if _lies_inside(path, root) and not os.path.isdir(path) and not pattern:
        return path
    if os.path.isabs(name):
        name = os.path.relpath(name, root or os.curdir)
    return f"{root or os.curdir}{_LISTED}{name}"


def check_is_file(path: str) -> None:
    """Raise ImageReadError for a path that ``find_files`` kept though it stands for no file.

    It is a folder, a pattern without a match, or a name in a list that leads out of its folder.
    """
    root, listed, _ = path.rpartition(_LISTED)
    if listed:
        where = repr(os.path.abspath(path))
        if not _lies_inside(path, root):
            raise ImageReadError(
                "{path}, named in a list, lies outside of {root}", path=where, root=repr(root)
            )
        if os.path.isdir(path):
            raise ImageReadError("{path} is a directory; a list names files", path=where)
    elif os.path.isdir(path):
        try:
            os.scandir(path).close()
        except OSError as error:
            problem = f"{{path}} is a directory that cannot be listed: {error.strerror}"
            raise ImageReadError(problem, path=repr(path)) from error
        raise ImageReadError("{path} is a directory without image files", path=repr(path))
    elif glob.has_magic(path) and not os.path.lexists(path):
        raise ImageReadError("no file matches the pattern {path}", path=repr(path))


def _lies_inside(path: str, root: str) -> bool:
    """Whether a path, with links resolved, lies in ``root``; "" is the current folder."""
    real_root = os.path.realpath(root)
    return os.path.commonpath([real_root, os.path.realpath(path)]) == real_root


def _expand(name: str, left_out: LeftOut | None) -> Iterator[tuple[str, str]]:
    is_glob = _LISTED not in name and glob.has_magic(name) and not os.path.lexists(name)
    is_empty = True
    for match in _glob(name) if is_glob else [name]:
        is_folder = _LISTED not in name and os.path.isdir(match)
        if not is_folder:
            is_empty = False
            if left_out is not None:
                left_out.keep(match)
            yield match, match
            continue
        for path, _ in images_in(match, left_out, (PACKED_SUFFIX,)):
            is_empty = False
            yield match, path
    if is_empty:
        yield name, name


def _glob(pattern: str) -> Iterator[str]:
    """Yield what a pattern matches. Unlike in ``glob.glob``, ``**`` survives link loops."""
    parts = pattern.replace(os.sep, "/").split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    first = parts.index("**")
    rest = parts[first:]
    while rest and rest[-1] in ("**", ""):  # "folder/**" is the folder
        rest.pop()
    start = "/".join(parts[:first]) + "/" * (first > 0)
    for root in glob.iglob(start) if glob.has_magic(start) else [start]:
        if not os.path.isdir(root or os.curdir):
            continue
        if not rest:
            yield root or os.curdir
            continue
        for path, kind in walk(root):
            names = path[len(root) :].replace(os.sep, "/").strip("/").split("/")
            if kind == "unlisted" or (names != [""] and _matches(names, rest)):
                yield path


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[i:], patterns[1:]) for i in range(len(names) + 1))
    if not names or not fnmatch.fnmatch(names[0], patterns[0]):
        return False
    return _matches(names[1:], patterns[1:])
