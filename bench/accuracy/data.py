"""Labelled images that training does not see."""

from __future__ import annotations

from collections.abc import Iterable

from squid_fast.data import ImageSet, Record, load_images, select

SPLITS = ("val", "test")


def held_out(records: Iterable[Record], side: int) -> dict[str, ImageSet]:
    """The labelled images of the splits ``val`` and ``test``, ``side`` pixels wide and high.

    Raises:
        ValueError: A split has no labelled images.
    """
    labelled = [record for record in records if record.label is not None]
    found = {}
    for split in SPLITS:
        chosen = select(labelled, split)
        if not chosen:
            raise ValueError(
                f"{len(labelled)} labelled images are given, but none in the split {split!r}; "
                "both 'val' and 'test' are needed."
            )
        found[split] = load_images(chosen, side)
    return found
