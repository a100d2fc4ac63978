"""Images and options of the programs that train or evaluate."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable

from squid_fast.data import ImageSet, Record, load_images, select

from ..arguments import add_data, add_option, add_output, add_threads
from ..measurements import RESULTS

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
            given = f"{len(labelled)} labelled images are given"
            raise ValueError(f"{given}, but none in {split!r}; 'val' and 'test' need some.")
        found[split] = load_images(chosen, side)
    return found


def add_training(parser: ArgumentParser, epochs: int) -> None:
    """Add what a program that trains is given, with that default of the epochs."""
    add_data(parser)
    add_option(parser, "--epochs", epochs, "Number of epochs of a network")
    add_threads(parser)
    add_option(parser, "--seed", 0, "Seed of everything random")
    add_output(parser, RESULTS / "accuracy")
