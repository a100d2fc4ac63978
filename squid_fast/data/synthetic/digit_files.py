"""DigitAnatomy as a dataset on disk."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...utils.extras import require
from ...utils.outputs import check_folder
from ...utils.seeds import check_seed
from .digit_anatomy import KINDS, DigitAnatomy, DigitGrids

DEFAULT_COUNTS = {"train": (2000, 0), "val": (200, 200), "test": (500, 500)}
"""Default numbers of normal and anomalous grids in each split."""

_COLUMNS = ("image_path", "label", "split", "kind", "mask_path")


def write_digit_anatomy(
    out_dir: str | os.PathLike[str],
    counts: Mapping[str, tuple[int, int]] = DEFAULT_COUNTS,
    source: str | os.PathLike[str] | None = None,
    cell: int = 32,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a dataset that ``find_records`` reads back, and return the path of its table.

    PNG images go to ``images/{split}/``, the masks of anomalous grids (255 where affected) to
    ``masks/{split}/``, and the table ``labels.csv`` with image_path, label, split, kind, mask_path
    (empty for normal grids) is written last.

    Args:
        counts: (normal, anomalous) grids by split.
        source, cell, seed, kinds: as for ``DigitAnatomy``.
        overwrite: write into a folder that already has a ``labels.csv``.
        on_progress: called with (images written, images in all).

    Raises:
        FileExistsError: there is a ``labels.csv`` already.
        OSError: the folder cannot be written to.
        DigitSourceError, ImportError, ValueError: as ``DigitAnatomy``.

    >>> from squid_fast.data import find_records
    >>> table = write_digit_anatomy("digits", {"train": (4, 0), "test": (2, 2)}, cell=8)
    >>> len(find_records(table))
    8
    """
    root = Path(out_dir)
    table = root / "labels.csv"
    check_folder(root)
    check_seed(seed)
    if table.exists() and not overwrite:
        raise FileExistsError(f"{table} exists already; choose another folder or overwrite it")
    require("PIL.Image", "train")
    total = sum(normal + anomalous for normal, anomalous in counts.values())
    rows: list[tuple[str, int, str, str, str]] = []
    for split, (normal, anomalous) in counts.items():
        digits = DigitAnatomy(source, cell, split, seed)
        for grids in (digits.normal(normal), digits.anomalous(anomalous, kinds=kinds)):
            for row in _write_grids(root, split, grids):
                rows.append(row)
                if on_progress is not None:
                    on_progress(len(rows), total)
    root.mkdir(parents=True, exist_ok=True)
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows(rows)
    return table


def _write_grids(
    root: Path, split: str, grids: DigitGrids
) -> Iterator[tuple[str, int, str, str, str]]:
    pil = require("PIL.Image", "train")
    for folder in ("images", "masks"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for number, kind in enumerate(grids.kinds):
        name = f"{split}/{kind}_{number:05d}.png"
        pil.fromarray(grids.images[number, 0].numpy()).save(root / "images" / name)
        mask, mask_path = grids.masks[number, 0], ""
        if mask.any():
            mask_path = f"masks/{name}"
            pil.fromarray(mask.numpy().astype(np.uint8) * 255).save(root / mask_path)
        yield f"images/{name}", int(grids.labels[number]), split, kind, mask_path
