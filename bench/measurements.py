"""Measured figures: what is said about where they come from, and the files that hold them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from squid_fast.utils import machine
from squid_fast.utils.atomic import replacing

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def commit() -> str:
    """The commit measured, with ``-dirty`` where files differ from it.

    The environment variable ``BENCH_COMMIT`` names it where there is no repository.
    """
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read(path: Path) -> dict[str, Any]:
    """The content of a file of figures, which is empty where the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a file of figures, whole or not at all, with a line for each entry of a list.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON cannot say.
    """
    lines = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(json.dumps(row, allow_nan=False, ensure_ascii=False) for row in value)
            text = f"[\n{rows}\n]"
        else:
            text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
        lines.append(f"{json.dumps(name, ensure_ascii=False)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


class Results:
    """Figures of a run, with what they depend on, and the file that they go to.

    Args:
        settings: What was chosen for this run.
        part: Name of these results in a file that holds several, of which the others stay as they
            are; None where the file holds nothing else.

    Attributes:
        header: Machine, versions, date, commit and settings.
        figures: The figures by name.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        settings: Mapping[str, Any] | None = None,
        part: str | None = None,
    ) -> None:
        self.path, self.part = path, part
        about = machine.describe(device) | {"commit": commit()}
        self.header: dict[str, Any] = {**about, **(settings or {})}
        self.figures: dict[str, Any] = {}

    def resume(self, *same: str) -> None:
        """Take over the figures of the file if the header agrees with this run's.

        Args:
            same: Names of the fields that must agree; all but the date if none are given.
        """
        known = read(self.path)
        names = same or self.header.keys() - {"date"}
        if all(name in known and known[name] == self.header[name] for name in names):
            self.figures = {name: x for name, x in known.items() if name not in self.header}

    def write(self) -> None:
        own = self.header | self.figures
        write(own if self.part is None else read(self.path) | {self.part: own}, self.path)
