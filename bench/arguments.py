"""Options of commands, each in a line."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from .measurements import RESULTS, ROOT

_METAVARS = {int: "N", float: "X", Path: "FOLDER"}


def add_option(parser: ArgumentParser, name: str, default: Any, help: str, **settings: Any) -> None:
    """Add an option that has the type of its default, which its help names; of a list, several."""
    several = default if isinstance(default, list) else [default]
    kind = Path if isinstance(default, Path) else type(several[0])
    shown = os.path.relpath(default, ROOT) if kind is Path else " ".join(map(str, several))
    settings = {"type": kind, "help": f"{help}. Default: {shown}."} | settings
    if several is default:
        settings["nargs"] = "+"
    if "choices" not in settings:
        settings["metavar"] = _METAVARS[kind]
    parser.add_argument(name, default=default, **settings)


def add_folder(parser: ArgumentParser, name: str, help: str, required: bool = False) -> None:
    """Add an option that takes a folder and has no default."""
    parser.add_argument(name, type=Path, metavar="FOLDER", help=help, required=required)


def add_output(parser: ArgumentParser, folder: Path = RESULTS) -> None:
    """Add the folder of the results file."""
    add_option(parser, "--output", folder, "Folder of the results file")


def add_device(parser: ArgumentParser) -> None:
    """Add the device that is measured."""
    help = "Device to measure. Default: the GPU if there is one."
    parser.add_argument("--device", choices=("cpu", "cuda"), help=help)


def thread_count() -> int:
    """As many threads as the environment says, or as this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(os.environ.get("OMP_NUM_THREADS") or cores or 1)


def add_threads(parser: ArgumentParser) -> None:
    """Add the number of PyTorch threads."""
    add_option(parser, "--threads", thread_count(), "Number of PyTorch threads")


def add_data(parser: ArgumentParser, required: bool = True) -> None:
    """Add the labelled images."""
    help = "Folder of labelled images, in a layout that squid-fast knows."
    add_folder(parser, "--data", help, required)
