"""What is known of one image of a dataset, in terms that all layouts share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .listing import LeftOut

NORMAL, ANOMALOUS = 0, 1

SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
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


Layout = tuple[Callable[[Path], bool], Callable[[Path, LeftOut], Iterator[Record]]]
"""A test whether a folder has this layout, and a function that lists its records.

The function counts files that are no images in ``LeftOut``.
"""


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


def overview(records: Iterable[Record]) -> str:
    """The number of images of each split and label, for people.

    >>> overview([Record(Path("a.png"), NORMAL, "train"), Record(Path("b.png"), None, None)])
    'train 1 normal; without split 1 of unknown label'
    """
    counts = Counter((record.split, record.label) for record in records)
    order = {name: place for place, name in enumerate(dict.fromkeys(SPLITS.values()))}
    splits = sorted(
        {split for split, _ in counts}, key=lambda name: (order.get(name or "", 9), name or "")
    )
    kinds = {NORMAL: "normal", ANOMALOUS: "anomalous", None: "of unknown label"}
    parts = []
    for split in splits:
        found = {kind: counts[split, label] for label, kind in kinds.items()}
        listed = ", ".join(f"{count:,} {kind}" for kind, count in found.items() if count)
        parts.append(f"{split or 'without split'} {listed}")
    return "; ".join(parts)


def enumerated(names: Sequence[str], noun: str) -> str:
    """The number of names and the first few of them, for error messages.

    >>> enumerated(["train"], "folders")
    '1 folder (train)'
    """
    if not names:
        return f"no {noun}"
    noun = noun.removesuffix("s") if len(names) == 1 else noun
    return f"{len(names)} {noun} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
