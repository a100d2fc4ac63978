"""Options that several commands have."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from pathlib import Path

from .measurements import RESULTS, ROOT


def add_output(parser: ArgumentParser, folder: Path = RESULTS) -> None:
    """The folder of the results file."""
    parser.add_argument(
        "--output",
        type=Path,
        default=folder,
        metavar="FOLDER",
        help=f"Folder of the results file. Default: {os.path.relpath(folder, ROOT)}.",
    )


def add_device(parser: ArgumentParser) -> None:
    """The device that is measured."""
    help = "Device to measure, cpu or cuda. Default: the GPU if there is one."
    parser.add_argument("--device", metavar="DEVICE", help=help)


def thread_count() -> int:
    """As many threads as the environment says, or as this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(os.environ.get("OMP_NUM_THREADS") or cores or 1)


def add_threads(parser: ArgumentParser) -> None:
    """The number of PyTorch threads."""
    help = "Number of PyTorch threads. Default: that of the cores, or OMP_NUM_THREADS."
    parser.add_argument("--threads", type=int, default=thread_count(), metavar="N", help=help)


def add_seed(parser: ArgumentParser) -> None:
    """The seed of everything random."""
    help = "Seed of everything random. Default: %(default)s."
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=help)


def add_data(parser: ArgumentParser, required: bool = True) -> None:
    """The labelled images."""
    help = "Folder of labelled images, in a layout that squid-fast knows."
    parser.add_argument("--data", type=Path, required=required, metavar="FOLDER", help=help)
