"""Images of one grey level each, by which tests know them again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

SIZE = 8


def write_levels(folder: Path, levels: Iterable[int]) -> list[str]:
    """Images of ``SIZE`` x ``SIZE``, named by their level; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_level(folder / f"{level:02d}.npy", level) for level in levels]


def write_level(path: Path, level: int) -> str:
    np.save(path, np.full((SIZE, SIZE), level, dtype=np.uint8))
    return str(path)
