"""The images of a dataset that a verb names, with a word on what was found."""

from __future__ import annotations

import warnings
from pathlib import Path

from ..data import Record, find_records, select
from ..data.listing import LeftOut, counted
from ..data.records import SPLITS, overview
from .console import say


def found_records(data: Path, layout: str = "auto") -> list[Record]:
    """The records of ``find_records``; says how many there are of each label and split."""
    left_out = LeftOut()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        records = find_records(data, layout, left_out)
    say(f"{data}: {overview(records)}")
    for warning in caught:
        say(str(warning.message), "yellow")
    if left_out.counts:
        say(counted(left_out.counts))
    return records


def labelled(records: list[Record], split: str, data: Path) -> list[Record]:
    """The labelled records of a split, or of "all"; a ValueError says which there are if none."""
    name = SPLITS.get(split.lower(), split)
    chosen = records if name == "all" else select(records, name)
    found = [record for record in chosen if record.label is not None]
    if not found:
        raise ValueError(
            f"{data} has no labelled images in the split {split!r}; it has {overview(records)}."
        )
    return found
