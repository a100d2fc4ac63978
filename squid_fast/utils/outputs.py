"""Places for results, checked before the work whose results they are to take."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Collection, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path

from .atomic import destination, is_special, partial_of

_PathInput = str | os.PathLike[str]


def check_file(out: _PathInput) -> None:
    """Raise an OSError unless a file can be written at ``out``, or the one there replaced.

    A link is followed. A device or a pipe fits, too.

    >>> check_file("reports/ward-3.html")
    Traceback (most recent call last):
    FileNotFoundError: 'reports/ward-3.html' cannot be written: there is no ...
    """
    if is_special(out):
        return
    place = destination(out)
    if place.is_dir():
        raise IsADirectoryError(f"{str(out)!r} is a folder; name the file that is to be in it")
    if not place.parent.is_dir():
        raise FileNotFoundError(
            f"{str(out)!r} cannot be written: there is no folder {str(place.parent)!r}; make it, "
            "or name another"
        )
    if place.exists() and not os.access(place, os.W_OK):
        raise PermissionError(f"{str(out)!r} cannot be written: you may not write to this file")
    _check_access(out, place.parent)
    with suppress(FileNotFoundError):  # but not an error about a name that is too long
        if stat.S_ISDIR(os.lstat(partial_of(place)).st_mode):
            raise IsADirectoryError(
                f"{str(out)!r} cannot be written: the folder {str(partial_of(place))!r} is in the "
                "way; name another file"
            )


def check_folder(out: _PathInput) -> None:
    """Raise an OSError unless ``out`` is a folder that can be written to, or can become one.

    >>> check_folder("runs/new")
    >>> _ = Path("runs").write_text("no folder")
    >>> check_folder("runs/new")
    Traceback (most recent call last):
    NotADirectoryError: 'runs/new' cannot be a folder for results: 'runs' is a file; name ...
    """
    above = Path(out)
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if not above.is_dir():
        what = "a link to nothing" if above.is_symlink() and not above.exists() else "a file"
        raise NotADirectoryError(
            f"{str(out)!r} cannot be a folder for results: {str(above)!r} is {what}; name another"
        )
    _check_access(out, above)


def check_distinct(
    outputs: Mapping[str, _PathInput | None],
    inputs: Mapping[str, Collection[_PathInput]] | None = None,
) -> None:
    """Refuse outputs that would overwrite one another, or what is read.

    Files are the same if their links lead to the same place, or if they are hard links of one file,
    or if a file system tells their names apart by nothing that it heeds, such as case.

    Args:
        outputs: files to be written, or folders, by the name of their argument; None for none.
        inputs: files that are read, by what to call them; they need not exist.

    Raises:
        ValueError: two are the same.

    >>> check_distinct({"out": "a.csv", "report": "./a.csv"})
    Traceback (most recent call last):
    ValueError: report is 'a.csv', the same file as out; name another.
    """
    given = {
        name: Path(path)
        for name, path in outputs.items()
        if path is not None and not is_special(path)
    }
    for (first, one), (second, other) in combinations(given.items(), 2):
        if _same(one, other):
            raise ValueError(f"{second} is {str(other)!r}, the same file as {first}; name another.")
        for (name, inner), (outer_name, outer) in (
            ((first, one), (second, other)),
            ((second, other), (first, one)),
        ):
            if _same(inner.parent, outer):
                raise ValueError(f"{name} is {str(inner)!r}, which lies in {outer_name}.")
    for name, path in given.items():
        for what, files in (inputs or {}).items():
            if same := next((file for file in files if _same(path, Path(file))), None):
                raise ValueError(
                    f"{name} is {str(path)!r}, which would overwrite {what} {os.fspath(same)!r}; "
                    "name another."
                )


def _check_access(out: _PathInput, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{str(out)!r} cannot be written: you may not write to the folder {str(folder)!r}"
        )


def _same(first: Path, second: Path) -> bool:
    """Whether two paths are one place, which may be free."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):  # one of them does not exist, or cannot
        pass
    are_links = os.path.islink(first) or os.path.islink(second)
    if _folded(first.name) != _folded(second.name) and not are_links:
        return False
    try:
        first, second = (Path(os.path.realpath(path)) for path in (first, second))
        if not os.path.samefile(first.parent, second.parent):
            return False
    except (OSError, ValueError):
        return first == second
    if first.name == second.name:
        return True
    return _folded(first.name) == _folded(second.name) and _ignores_case(first.parent)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _ignores_case(folder: Path) -> bool:
    other = Path(str(folder).swapcase())
    return other != folder and other.exists() and other.samefile(folder)
