"""Which files the names, folders and globs of a command line stand for."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import deque
from collections.abc import Iterable, Iterator

from ...data import IMAGE_SUFFIXES

PathInput = str | os.PathLike[str]

SHARD_SUFFIX = ".arrow"
"""Of files that hold packed images, see `squid_fast.screening.reading.shards`."""

_WANTED_SUFFIXES = (*IMAGE_SUFFIXES, SHARD_SUFFIX)
_LISTED = f"{os.sep}.{os.sep}.{os.sep}"


def find_files(inputs: PathInput | Iterable[PathInput]) -> list[str]:
    """List the files that ``inputs`` name, each once, in the order given.

    - A file is kept as it is named, whatever its suffix, whether it exists or not.
    - A folder is walked. It gives its image files and shards (by suffix) and files without a
      suffix, as DICOM files often are, sorted by path. A folder that gives none is kept itself,
      and so is one inside it that is named like an image and holds no file, or that cannot be
      listed.
    - A glob gives what it matches, sorted; ``**`` matches any number of folders. Matched folders
      are walked. A glob without a match is kept itself.

    What is kept and is no readable file gets a row with an error from `screen`. Hidden files and
    folders are left out unless named. Links to folders are followed, each folder being walked
    once, so that loops end.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    found: dict[str, str] = {}
    for item in given:
        for path in _expand(os.fspath(item)):
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def listed_file(name: str, root: str) -> str:
    """The path that `find_files` takes for a name in a list: a file inside of ``root``.

    A name that leads out of ``root``, through ``..``, absolutely or by a link, that is a folder,
    or that is missing and looks like a pattern gets a path that `find_files` keeps as it is and
    that `explain_no_file` explains: ``ROOT/././NAME``.
    """
    name = os.path.normpath(name)
    path = os.path.join(root, name)
    pattern = glob.has_magic(path) and not os.path.lexists(path)
    if _lies_inside(path, root) and not os.path.isdir(path) and not pattern:
        return path
    if os.path.isabs(name):
        name = os.path.relpath(name, root or os.curdir)
    return f"{root or os.curdir}{_LISTED}{name}"


def explain_no_file(path: str) -> str | None:
    """Why a path that `find_files` kept stands for no file, in a sentence, or None."""
    root, listed, _ = path.rpartition(_LISTED)
    if listed:
        if not _lies_inside(path, root):
            return f"{os.path.abspath(path)!r}, named in a list, lies outside of {root!r}"
        if os.path.isdir(path):
            return f"{os.path.abspath(path)!r} is a directory; a list names files"
        return None
    if os.path.isdir(path):
        try:
            os.scandir(path).close()
        except OSError as error:
            return f"{path!r} is a directory that cannot be listed: {error.strerror}"
        return f"{path!r} is a directory without image files"
    if glob.has_magic(path) and not os.path.lexists(path):
        return f"no file matches the pattern {path!r}"
    return None


def _lies_inside(path: str, root: str) -> bool:
    """Whether a path leads to a place below ``root``, links being followed; "" is here."""
    real_root = os.path.realpath(root)
    return os.path.commonpath([real_root, os.path.realpath(path)]) == real_root


def _expand(path: str) -> list[str]:
    if _LISTED in path:
        return [path]
    if os.path.isdir(path):
        return _files_in(path) or [path]
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    found = []
    for match in _glob(path):
        found += _files_in(match) if os.path.isdir(match) else [match]
    return found or [path]


def _files_in(folder: str) -> list[str]:
    """Paths below ``folder`` that deserve a row, sorted; see `find_files`."""
    found = []
    for path, kind in _walk(folder):
        name = os.path.basename(path).lower()
        suffix = os.path.splitext(name)[1]
        if kind == "folder":
            wanted = name.endswith(_WANTED_SUFFIXES) and not any(
                files for *_, files in os.walk(path)
            )
        else:
            # Names that are DICOM identifiers, such as 1.2.840.10008, have no suffix either.
            no_suffix = not suffix or suffix[1:].isdigit()
            wanted = kind == "unlisted" or no_suffix or name.endswith(_WANTED_SUFFIXES)
        if wanted:
            found.append(path)
    return sorted(found)


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """Yield what lies below ``root``, and itself, as (path, "file", "folder" or "unlisted").

    Hidden entries are left out. Links to folders come after all real folders and are followed
    where they lead to a folder not yet walked that does not hold ``root``.
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
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                yield path, "file"
            elif entry.is_symlink():
                links.append(path)
            else:
                folders.append((path, os.path.join(real, entry.name)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere or in a circle; reading it gives the error
        return False


def _glob(pattern: str) -> list[str]:
    """What a pattern matches, sorted. Unlike `glob.glob`, ``**`` ends on looping links."""
    parts = pattern.replace(os.sep, "/").split("/")
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    first = parts.index("**")
    rest = parts[first:]
    while rest and rest[-1] in ("**", ""):  # "folder/**" is the folder
        rest.pop()
    start = "/".join(parts[:first]) + "/" * (first > 0)
    roots = sorted(glob.glob(start)) if glob.has_magic(start) else [start]
    roots = [root for root in roots if os.path.isdir(root or os.curdir)]
    if not rest:
        return [root or os.curdir for root in roots]
    found = []
    for root in roots:
        for path, kind in _walk(root):
            names = path[len(root) :].replace(os.sep, "/").strip("/").split("/")
            if kind == "unlisted" or (names != [""] and _matches(names, rest)):
                found.append(path)
    return sorted(found)


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[i:], patterns[1:]) for i in range(len(names) + 1))
    if not names or not fnmatch.fnmatch(names[0], patterns[0]):
        return False
    return _matches(names[1:], patterns[1:])
