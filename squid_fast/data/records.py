"""What is known of one image of a dataset, in terms that all layouts share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NORMAL, ANOMALOUS = 0, 1

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Splits by the names that datasets give them, in lower case."""


class LayoutError(ValueError):
    """A dataset is not laid out in a known way; the message says what was found."""


@dataclass(frozen=True)
class Record:
    """One image of a dataset.

    Attributes:
        path: the image file.
        label: 0 normal, 1 anomalous, None unknown.
        split: "train", "val", "test" or another name that the dataset uses; None if it has none.

    >>> Record(Path("a.png"), label=1, split="test").label
    1
    """

    path: Path
    label: int | None
    split: str | None


Layout = tuple[Callable[[Path], bool], Callable[[Path], Iterator[Record]]]
"""A test whether a folder has this layout, and a function that lists its records."""


def select(
    records: Iterable[Record], split: str | None = None, label: int | None = None
) -> list[Record]:
    """The records of one split, of one label, or both; None means any.

    >>> records = [Record(Path("a.png"), 0, "train"), Record(Path("b.png"), 1, "test")]
    >>> [record.path.name for record in select(records, split="test")]
    ['b.png']
    """
    return [
        record
        for record in records
        if (split is None or record.split == split) and (label is None or record.label == label)
    ]


def enumerated(names: Sequence[str], noun: str) -> str:
    """The number of names and the first few of them, for error messages."""
    if not names:
        return f"no {noun}"
    return f"{len(names)} {noun} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
