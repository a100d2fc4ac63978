"""Which of a run's errors are the same but for the file."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, field

from ..pipeline import ScreenRow

_MAX_KINDS = 50
_MAX_ROWS = 100
_MAX_REASON = 500  # characters; more may come from a library, and tell kinds apart no better
_OTHER = ("other reasons",)
_GAP = "…"
# What differs between files that are broken in the same way: quoted text, other paths, numbers.
_PARTICULAR = re.compile(
    r"""(?<!\w)b?(['"])(?:\\.|(?!\1)[^\\])*\1(?!\w)  # as repr() writes it
    | (?<![^\s,;:()])[^\s,;:()]*[/\\][^\s,;:()]*
    | \d+(?:[.,]\d+)*""",
    re.VERBOSE,
)


@dataclass
class ErrorKind:
    """Errors that differ in nothing but the file and its particulars.

    Attributes:
        count: files of this kind.
        rows: the first 100 of them.
    """

    _common: tuple[str, ...]
    _particulars: list[str]  # what stands between the common parts
    count: int = 0
    rows: list[ScreenRow] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """The sentence without the file's path; what differs between the files is ``…``."""
        pairs = itertools.zip_longest(self._common, self._particulars, fillvalue="")
        return "".join(itertools.chain.from_iterable(pairs))

    def add(self, row: ScreenRow, particulars: list[str]) -> None:
        self._particulars = [
            ours if ours == theirs else _GAP
            for ours, theirs in zip(self._particulars, particulars, strict=True)
        ]
        self.count += 1
        if len(self.rows) < _MAX_ROWS:
            self.rows.append(row)


class ErrorKinds:
    """Counts rows without a score by their kind.

    Memory: 100 rows of each kind. There are at most 50 kinds, and one for all others.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, ...], ErrorKind] = {}

    def add(self, row: ScreenRow) -> None:
        """Count one row without a score."""
        common, particulars = _split(_without_path(row.error or "", row.path)[:_MAX_REASON])
        if common not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            common, particulars = _OTHER, []
        kind = self._kinds.setdefault(common, ErrorKind(common, particulars))
        kind.add(row, particulars)

    def most_frequent_first(self) -> list[ErrorKind]:
        """The kinds; among equally frequent ones the earlier first."""
        return sorted(self._kinds.values(), key=lambda kind: -kind.count)


def _without_path(error: str, path: str) -> str:
    """The sentence with "the file" in the place of its path, or nothing where a colon follows."""
    for name in (os.path.abspath(path), path):
        for spelled in (repr(name), name, " ".join(name.split())):
            before, found, after = error.partition(spelled) if spelled else (error, "", "")
            if found and not (before[-1:].isalnum() or after[:1].isalnum()):
                return f"{before}the file{after}".removeprefix("the file: ")
    return error


def _split(reason: str) -> tuple[tuple[str, ...], list[str]]:
    """What a sentence has in common with others of its kind, and what stands in between."""
    common, particulars, end = [], [], 0
    for match in _PARTICULAR.finditer(reason):
        common.append(reason[end : match.start()])
        particulars.append(match.group())
        end = match.end()
    return (*common, reason[end:]), particulars
