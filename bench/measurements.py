"""What a figure of this repository has to say about where it comes from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

from squid_fast.utils import machine

ROOT = Path(__file__).parents[1]


def commit() -> str:
    """The commit measured, with ``-dirty`` where files differ from it.

    ``BENCH_COMMIT`` says it where the repository's history is not at hand.
    """
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(device: torch.device) -> dict[str, str | int | None]:
    """Device, threads, versions, date and commit."""
    return machine.describe(device) | {"commit": commit()}
