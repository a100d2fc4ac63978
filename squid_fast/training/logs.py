"""Logs of a run's figures: a CSV file, or TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal, get_args

from ..utils.extras import require

LogKind = Literal["csv", "tensorboard"]


class Logger:
    """Takes figures by name, at a step; this one writes them nowhere."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class CsvLogger(Logger):
    """Appends one row of ``step, name, value`` per figure to ``metrics.csv``.

    Rows after ``step``, which a run that crashed wrote after its last checkpoint, are removed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "metrics.csv"
        rows = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (kept open)
        self._writer = csv.writer(self._file)
        self._writer.writerow(("step", "name", "value"))
        self._writer.writerows(row for row in rows if int(row[0]) <= step)
        self._file.flush()

    def log(self, step: int, values: dict[str, float]) -> None:
        self._writer.writerows((step, name, repr(value)) for name, value in values.items())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLogger(Logger):
    """Writes event files into the folder ``tensorboard``."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def check_log(kind: LogKind) -> None:
    """Raise ValueError for an unknown kind of log, and ImportError if its library is missing."""
    if kind not in get_args(LogKind):
        raise ValueError(f"the log is {kind!r}; it must be 'csv' or 'tensorboard'.")
    if kind == "tensorboard":
        require("tensorboard", "train")


def make_logger(kind: LogKind, folder: Path, step: int) -> Logger:
    """A logger of that kind that writes into ``folder`` what comes after ``step``."""
    check_log(kind)
    return CsvLogger(folder, step) if kind == "csv" else TensorBoardLogger(folder, step)
