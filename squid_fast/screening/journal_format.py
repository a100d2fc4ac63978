"""What the files of a screening run's journal hold; see `squid_fast.screening.journal`."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from .pipeline import ScreenRow

_SCORED = [str, float, float, float, bool, NoneType]
_FAILED = [str, NoneType, NoneType, NoneType, NoneType, str]


class JournalError(RuntimeError):
    """A run cannot be started, resumed or gone on with; the message says why and what would do."""


@dataclass(frozen=True)
class Run:
    """What is being run. Rows of runs that differ in any of it do not belong in one table.

    Attributes:
        fingerprint: of the scorer.
        score_name: of the scorer.
        threshold: of the scorer.
        inputs: the first of the inputs as the user named them, for people.
        inputs_sha256: of all of them.
        folder: where relative inputs start, or None.
    """

    fingerprint: str
    score_name: str
    threshold: float
    inputs: list[str]
    inputs_sha256: str
    folder: str | None


def row_line(row: ScreenRow) -> bytes:
    """A row as a line of ASCII; the threshold is left out, being that of the run."""
    values = (row.path, row.raw_score, row.z_score, row.anomaly_score, row.flag, row.error)
    return (json.dumps(values) + "\n").encode("ascii")


def parse_line(line: bytes) -> list[Any]:
    """Path, raw score, z-score, anomaly score, flag and error of a line.

    Raises:
        ValueError: the line is torn or damaged.
    """
    if not line.endswith(b"\n"):
        raise ValueError("the line is torn")
    try:
        values = json.loads(line.decode("ascii"))
    except RecursionError as error:
        raise ValueError("the line is no row") from error
    if type(values) is not list or list(map(type, values)) not in (_SCORED, _FAILED):
        raise ValueError("the line is no row")
    return values


def paths_of_rows(files: Sequence[str], packed: Mapping[int, int]) -> Iterator[str | None]:
    """The path of each row to come; None for those that only a packed file knows."""
    for index, path in enumerate(files):
        if index in packed:
            yield from itertools.repeat(None, packed[index])
        else:
            yield path


def listing_bytes(files: Sequence[str]) -> bytes:
    """Paths as bytes, each ended by a NUL.

    Raises:
        ValueError: a path that no file system can hold.
    """
    try:
        encoded = [os.fsencode(path) for path in files]
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object!r} cannot be the name of a file") from error
    if bad := next((path for path in files if "\0" in path), None):
        raise ValueError(f"{bad!r} cannot be the name of a file: it holds a NUL")
    return b"".join(path + b"\0" for path in encoded)
