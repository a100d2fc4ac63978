"""The state of a training run: modules, optimisers, position, and how it is kept."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..inference.scores import PAPER_SCORE
from ..modules import SQUID, Discriminator, discriminator_size
from ..presets import Recipe
from ..utils.devices import Precision, choose_layout, to_layout
from ..utils.extras import require
from .checkpoint import CheckpointError, save_checkpoint
from .distributed import Processes, synchronise_batch_norm
from .ema import Average
from .step import Trainer, load_optimizer, make_optimizers

CHECKPOINT = "checkpoint.pt"


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the last good checkpoint is untouched."""


@dataclass(frozen=True)
class Settings:
    """What makes a run what it is; a resumed run must agree in all of it but ``epochs``."""

    model: dict[str, Any]
    recipe: Recipe
    seed: int
    precision: Precision
    images: int
    images_sha256: str


@dataclass(frozen=True)
class Kept:
    """The pair of a validated epoch, on the CPU.

    Attributes:
        epoch: counted from 1.
        validation: AUROCs by name.
        generator, discriminator: their state dicts.
    """

    epoch: int
    validation: dict[str, float]
    generator: dict[str, Any]
    discriminator: dict[str, Any]


class Run:
    """The modules on their device, their optimisers, and where in training they are."""

    def __init__(
        self,
        model: SQUID,
        settings: Settings,
        device: torch.device,
        processes: Processes | None = None,
        sync_batch_norm: bool = True,
        graphs: bool = True,
        fabric: Any = None,  # Lightning's, of another run; made unless given
    ) -> None:
        self.processes = processes or Processes()
        self.fabric = fabric or require("lightning_fabric", "train").Fabric(
            accelerator=device.type,
            precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
            **self.processes.fabric_arguments(device),
        )
        if self.processes.count > 1:
            self.fabric.launch()
            device = self.fabric.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            discriminator = Discriminator(discriminator_size(model.image_size))
        self.layout = choose_layout(settings.model["features_root"])
        self.model, self.discriminator = model.train(), discriminator.train()
        to_layout(model.to(device), self.layout)
        to_layout(discriminator.to(device), self.layout)
        if self.processes.count > 1 and sync_batch_norm:
            synchronise_batch_norm(model, device)
            synchronise_batch_norm(discriminator, device)
        self.graphs = graphs and device.type == "cuda" and self.processes.count == 1
        optimizers = make_optimizers(model, discriminator, settings.recipe, self.graphs)
        generator, generator_optimizer = self.fabric.setup(model, optimizers[0])
        judge, discriminator_optimizer = self.fabric.setup(discriminator, optimizers[1])
        self.optimizers = generator_optimizer, discriminator_optimizer
        decay = settings.recipe.averaging
        self.average = Average(discriminator, decay) if decay else None
        self.trainer = Trainer(
            generator,
            judge,
            self.optimizers,
            settings.recipe,
            self.fabric.backward,
            self.average,
            self._judge_alone if self.processes.count > 1 else None,
        )
        self.step = 0
        self.sums: dict[str, Tensor] = {}  # losses of this epoch so far, on the device
        self.validation: dict[str, float] = {}
        self.best: Kept | None = None  # where the recipe keeps it; on rank 0
        self.to_validate = False  # the epoch has ended, its validation has not
        self.threads: int | None = None  # that the run which is resumed computed with
        self._started, self._before = time.perf_counter(), 0.0

    def _judge_alone(self, images: Tensor) -> Tensor:
        with self.fabric.autocast():
            return self.discriminator(images)

    @property
    def minutes(self) -> float:
        """By the clock, validation and what ran before a resumption included."""
        return self._before + (time.perf_counter() - self._started) / 60

    @property
    def judge(self) -> Discriminator:
        """The discriminator that is validated and kept: the averaged one where there is one."""
        if self.average is None:
            return self.discriminator
        assert isinstance(self.average.module, Discriminator)
        return self.average.module

    def keep_if_best(self, epoch: int) -> None:
        """Remember the pair if no AUROC of the paper's score was better before."""
        area = f"auroc_{PAPER_SCORE}"
        if self.best is not None and self.best.validation[area] > self.validation[area]:
            return
        states = (_on_cpu(module.state_dict()) for module in (self.model, self.judge))
        self.best = Kept(epoch, dict(self.validation), *states)

    def save(self, settings: Settings, out: Path) -> None:
        """Write the checkpoint, unless a loss or a weight is not finite.

        Raises:
            NonFiniteLossError: then the last good checkpoint stays.
        """
        self.means()
        if not self.processes.is_main:
            return
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise NonFiniteLossError(
                f"training stopped at step {self.step}: a weight is not finite. The last good "
                "checkpoint is kept; a lower learning rate may help."
            )
        save_checkpoint(self.state(settings), out / CHECKPOINT)

    def close(self) -> None:
        """Part from the other processes."""
        if self.processes.count > 1:
            dist.destroy_process_group()

    def state(self, settings: Settings) -> dict[str, Any]:
        return {
            "format": 1,
            "settings": asdict(settings),
            "step": self.step,
            "generator": self.model.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": None if self.average is None else self.average.module.state_dict(),
            "sums": dict(self.sums),
            "validation": dict(self.validation),
            "best": None if self.best is None else vars(self.best),
            "minutes": self.minutes,
            "to_validate": self.to_validate,
            "threads": torch.get_num_threads() if self.processes.count == 1 else None,
        }

    def load(self, state: dict[str, Any], settings: Settings) -> None:
        was, now = _flat(state["settings"]), _flat(asdict(settings))
        changed = [
            f"{key} was {was.get(key)!r} and is {now.get(key)!r}"
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key) and key != "recipe.epochs"
        ]
        if changed:
            raise CheckpointError(
                f"the checkpoint is of a run with other settings: {'; '.join(changed)}."
            )
        self.model.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
            self.average.count.fill_(state["step"])
        self.step = state["step"]
        self.sums = {k: v.to(self.fabric.device) for k, v in state["sums"].items()}
        self.validation = state["validation"]
        self.best = None if state["best"] is None else Kept(**state["best"])
        self._before = state["minutes"]
        # Checkpoints of earlier versions lack these.
        self.to_validate = state.get("to_validate", False)
        if self.processes.count == 1:
            self.threads = state.get("threads") or torch.get_num_threads()

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            pair = torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def means(self, everywhere: bool = False) -> dict[str, float]:
        """Mean losses of this epoch; waits for the device.

        Args:
            everywhere: over all processes, which all have to ask, instead of this one.

        Raises:
            NonFiniteLossError: one of them is not finite.
        """
        sums = self.sums
        if everywhere:
            sums = {name: self.processes.total(pair) for name, pair in sums.items()}
        means = {name: (pair[0] / pair[1]).item() for name, pair in sums.items()}
        bad = [f"{name} is {value}" for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteLossError(
                f"training stopped at step {self.step}: {', '.join(bad)}. The last good checkpoint "
                "is kept; a lower learning rate or float32 in place of bf16 may help."
            )
        return means


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A copy, with the metadata that says how far a queue is filled."""
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
