"""A training run: what is trained, its settings, folder and log, and its progress."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..inference.scores import PAPER_SCORE
from ..presets import Recipe
from ..utils.devices import Precision
from .checkpoint import CHECKPOINT, CheckpointError, load_checkpoint, save_checkpoint, upgrade
from .graphs import Losses
from .learner import Learner
from .logs import Logger, LogKind, make_logger


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the last good checkpoint is untouched."""


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; a resumed run must agree in all of it but ``epochs``.

    Raises:
        ValueError: there are fewer images than a batch takes.
    """

    model: dict[str, Any]
    recipe: Recipe
    seed: int
    precision: Precision
    images: int
    images_sha256: str

    def __post_init__(self) -> None:
        check_count(self.images, self.recipe.batch_size)


def check_count(images: int, batch_size: int) -> None:
    """Raise ValueError for fewer training images than a batch takes."""
    if images < batch_size:
        raise ValueError(
            f"there are {images} training images, fewer than a batch of {batch_size}; a smaller "
            "--batch-size would fit."
        )


class Run:
    """A training run in the folder ``out``, of the checkpoint and the log.

    Raises:
        CheckpointError: nothing to resume, or from a run with other settings.
    """

    def __init__(
        self,
        learner: Learner,
        settings: Settings,
        out: Path,
        log: LogKind = "csv",
        resume: bool = False,
    ) -> None:
        self.learner, self.settings, self.checkpoint = learner, settings, out / CHECKPOINT
        self.is_main = learner.processes.is_main
        self.step = self.epoch = 0
        self.sums: Losses = {}  # of this epoch so far, on the device
        self.validation: dict[str, float] = {}
        self.best: dict[str, Any] | None = None  # best checkpoint, if kept; on rank 0
        self.to_validate = False  # the epoch has ended, its validation has not
        self.threads: int | None = None  # of the run that is resumed
        self._started, self._before = time.perf_counter(), 0.0
        if resume:
            self._load(upgrade(load_checkpoint(self.checkpoint), asdict(settings)))
        self._logger = make_logger(log, out, self.step) if self.is_main else Logger()

    @property
    def minutes(self) -> float:
        """Duration so far, including validation and what ran before the run was resumed."""
        return self._before + (time.perf_counter() - self._started) / 60

    def log(self, values: dict[str, float]) -> None:
        """Write figures by name to the log of rank 0, at this step."""
        self._logger.log(self.step, values)

    def close(self) -> None:
        """Close the log and leave the other processes."""
        self._logger.close()
        self.learner.processes.close()

    def validated(self, epoch: int, validation: dict[str, float]) -> None:
        """Take in the AUROCs of an epoch, counted from 1.

        If the recipe keeps the best checkpoint and no AUROC of the paper's score was better before,
        this becomes the best.
        """
        self.validation = validation
        name = f"auroc_{PAPER_SCORE}"
        if self.settings.recipe.keep != "best":
            return
        if self.best is not None and self.best["validation"][name] > validation[name]:
            return
        states = {k: _on_cpu(module.state_dict()) for k, module in self.learner.trained.items()}
        self.best = {"epoch": epoch, "validation": validation, **states}

    def restore_best(self) -> None:
        """Load the best checkpoint, if there is one, into what is trained."""
        if self.best is not None:
            for name, module in self.learner.trained.items():
                module.load_state_dict(self.best[name])
            self.epoch, self.validation = self.best["epoch"], self.best["validation"]

    def save(self) -> None:
        """Write the checkpoint.

        Raises:
            NonFiniteLossError: a loss or a weight is not finite; the last good checkpoint stays.
        """
        self.means()
        if not self.is_main:
            return
        weights = [p for module in self.learner.modules.values() for p in module.parameters()]
        if not all(bool(p.isfinite().all()) for p in weights):
            raise NonFiniteLossError(
                f"training stopped at step {self.step}: a weight is not finite. The last good "
                "checkpoint is kept; a lower learning rate may help."
            )
        state = {
            "format": 1, "settings": asdict(self.settings), "step": self.step, "sums": self.sums,
            "validation": self.validation, "best": self.best, "minutes": self.minutes,
            "to_validate": self.to_validate,
            "threads": torch.get_num_threads() if self.learner.processes.count == 1 else None,
        }  # fmt: skip
        save_checkpoint(state | self.learner.state(), self.checkpoint)

    def _load(self, state: dict[str, Any]) -> None:
        was, now = _flat(state["settings"]), _flat(asdict(self.settings))
        changed = [
            f"{key} was {was.get(key)!r} and is {now.get(key)!r}"
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key) and key != "recipe.epochs"
        ]
        if changed:
            raise CheckpointError(
                f"the checkpoint is of a run with other settings: {'; '.join(changed)}."
            )
        self.learner.load(state)
        self.step = state["step"]
        self.sums = {k: v.to(self.learner.device) for k, v in state["sums"].items()}
        self.validation, self.best = state["validation"], state["best"]
        self.to_validate, self._before = state["to_validate"], state["minutes"]
        if self.learner.processes.count == 1:
            self.threads = state["threads"] or torch.get_num_threads()

    def add(self, losses: Losses) -> None:
        """Add the losses of a step to those of the epoch."""
        for name, value in losses.items():
            pair = torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def means(self, everywhere: bool = False) -> dict[str, float]:
        """Mean losses of this epoch so far; waits for the device.

        ``everywhere`` averages over all processes, which must all call this.

        Raises:
            NonFiniteLossError: one of them is not finite.
        """
        sums = self.sums
        if everywhere:
            sums = {name: self.learner.processes.total(pair) for name, pair in sums.items()}
        means = {name: (pair[0] / pair[1]).item() for name, pair in sums.items()}
        bad = [f"{name} is {value}" for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteLossError(
                f"training stopped at step {self.step}: {', '.join(bad)}. The last good checkpoint "
                "is kept; a lower learning rate or float32 in place of bf16 may help."
            )
        return means


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state dict, with its metadata, which says how far a queue is filled."""
    kept = copy.copy(state)
    for name, value in state.items():
        kept[name] = value.detach().cpu().clone()
    return kept


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
