"""Trains what SQUID is compared with, as far as it has anything to train."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...data import ImageSet
from ...inference.calibration import calibrate_scores
from ...metrics import image_auroc
from ...presets import Recipe
from ...training import CheckpointError, NonFiniteLossError, Progress, learning_rate
from ...training.augment import augment
from ...training.checkpoint import load_checkpoint, save_checkpoint
from ...utils.devices import Precision, choose_device, choose_precision
from ...utils.machine import describe
from ...utils.threads import WORTH_TIMING, fastest_threads, threads
from .networks import AutoEncoder
from .scorer import METHODS, BaselineScorer, save_baseline
from .shallow import PixelMethod

RECIPE = Recipe(epochs=30, lr=1e-3, t_max=30, lr_floor=0.05)
CHECKPOINT = "checkpoint.pt"


@dataclass
class MethodResult:
    """How a training went: the part of ``TrainingResult`` that every method has."""

    finished: bool
    step: int
    validation: dict[str, float] = field(default_factory=dict)


def train_method(
    name: str,
    train_set: ImageSet,
    out: Path,
    *,
    recipe: Recipe = RECIPE,
    validation_set: ImageSet | None = None,
    false_positive_rate: float = 0.05,
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "auto",
    thread_count: int | None = None,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    about: Mapping[str, Any] | None = None,
) -> MethodResult:
    """Train a method of ``METHODS`` and, once it is finished, write its bundle into ``out``.

    Args:
        train_set: normal images.
        recipe: epochs, batch size, rate, schedule and augmentation; shallow methods need none.
        validation_set: its normal images give the threshold, both kinds the AUROC that is kept.
        thread_count: of PyTorch, as of ``squid_fast.training.train``.
        resume: go on from the checkpoint of a run that was stopped.
        report, should_stop: as of ``squid_fast.training.train``.
        about: what else the bundle is to say of itself.

    Raises:
        ValueError: no such method, fewer images than a batch, or the hardware does not compute in
            bf16.
        CheckpointError: nothing to resume, or ``out`` already holds a run.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; known are squid, {', '.join(METHODS)}.")
    if (out / CHECKPOINT).exists() and not resume:
        raise CheckpointError(f"{out} already holds a run; add --resume to go on with it.")
    where, kind = choose_device(device), METHODS[name][0]
    chosen = choose_precision(precision, where)
    count = thread_count or torch.get_num_threads()
    started, side, step = time.perf_counter(), train_set.images.shape[-1], 0
    if issubclass(kind, PixelMethod):
        method: PixelMethod | AutoEncoder = kind.fit(train_set)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            method = kind(image_size=side)
            settings: dict[str, Any] = {
                "method": name,
                "recipe": asdict(recipe),
                "images": train_set.fingerprint,
            }
            settings |= {"seed": seed, "precision": chosen}
            run = _Run(method.to(where), recipe, settings, out)
            if resume:
                run.load()
            count = thread_count or run.threads or run.fastest_threads(train_set)
            with threads(count):
                finished = run.train(train_set, report, should_stop)
            if not finished:
                return MethodResult(False, run.step)
            step = run.step
    scorer = BaselineScorer(name, method, side, device=where)
    normal = validation_set.normal if validation_set else None
    raw = scorer.raw_scores(train_set)
    scorer.calibration = calibrate_scores(scorer, raw, normal, false_positive_rate)
    validation = {}
    if validation_set is not None and len(set(validation_set.labels.tolist())) == 2:
        found = scorer.raw_scores(validation_set)[scorer.score_name].numpy()
        area = image_auroc(validation_set.labels.numpy(), found)
        validation = {f"auroc_{scorer.score_name}": area}
    facts = {
        "method": name,
        "recipe": None if isinstance(method, PixelMethod) else asdict(recipe),
        "seed": seed,
        "training_images": len(train_set),
        "training_minutes": round((time.perf_counter() - started) / 60, 2),
        "validation": validation,
        "machine": describe(where) | {"threads": count},
        **(about or {}),
    }
    save_baseline(scorer, out, facts)
    return MethodResult(True, step, validation)


class _Run:
    """The training of a network; what is drawn in a step is a function of seed and step."""

    def __init__(
        self, network: AutoEncoder, recipe: Recipe, settings: dict[str, Any], out: Path
    ) -> None:
        self.network, self.recipe, self.settings, self.out = network, recipe, settings, out
        self.optimizer = torch.optim.Adam(network.parameters(), recipe.lr, fused=True)
        self.step, self.loss = 0, torch.zeros(())
        self.threads: int | None = None  # that the run which is resumed computed with

    def fastest_threads(self, images: ImageSet) -> int:
        """How many a step is fastest with, where there is a choice and steps to gain by it."""
        most, size = torch.get_num_threads(), self.recipe.batch_size
        on_cpu = next(self.network.parameters()).device.type == "cpu"
        steps = self.recipe.epochs * (len(images) // size)
        if most == 1 or not on_cpu or steps < WORTH_TIMING:
            return most
        spare, batch = copy.deepcopy(self), images.batch(slice(0, size))
        return fastest_threads(lambda: spare._advance(batch, 0), most)

    def train(
        self,
        images: ImageSet,
        report: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        recipe, size = self.recipe, self.recipe.batch_size
        device = next(self.network.parameters()).device
        images, per_epoch = images.to(device), len(images) // size
        if not per_epoch:
            raise ValueError(f"there are {len(images)} images, fewer than a batch of {size}.")
        steps = recipe.epochs * per_epoch
        stopped = False
        while self.step < steps and not stopped:
            epoch, index = divmod(self.step, per_epoch)
            generator = torch.Generator().manual_seed(self._seed(-epoch - 1))
            order = torch.randperm(len(images), generator=generator)
            chosen = order[index * size : (index + 1) * size].to(device)
            torch.manual_seed(self._seed(self.step))
            self._advance(augment(images.batch(chosen), recipe.shift, recipe.scale), epoch)
            report(
                Progress(
                    epoch,
                    recipe.epochs,
                    self.step,
                    self.step / steps,
                    partial(self._losses, self.loss),
                )
            )
            stopped = should_stop()
        self.save()
        return self.step >= steps

    def _advance(self, batch: torch.Tensor, epoch: int) -> None:
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, epoch)
        bf16 = self.settings["precision"] == "bf16"
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
            loss = self.network.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()
        self.step += 1

    def _losses(self, loss: torch.Tensor) -> dict[str, float]:
        return {"loss": loss.item()}

    def _seed(self, number: int) -> int:
        return (self.settings["seed"] * 0x9E3779B97F4A7C15 + number) % 2**63

    def save(self) -> None:
        if not bool(self.loss.isfinite()):
            raise NonFiniteLossError(
                f"training stopped at step {self.step}: the loss is {self.loss.item()}. A lower "
                "learning rate may help."
            )
        state = {"step": self.step, "settings": self.settings, "loss": self.loss}
        state["threads"] = torch.get_num_threads()
        state["generator"] = self.network.state_dict()
        state["optimizer"] = self.optimizer.state_dict()
        save_checkpoint(state, self.out / CHECKPOINT)

    def load(self) -> None:
        state = load_checkpoint(self.out / CHECKPOINT)
        was, now = dict(state["settings"]), dict(self.settings)
        was["recipe"], now["recipe"] = (
            {k: v for k, v in settings["recipe"].items() if k != "epochs"}
            for settings in (was, now)
        )
        changed = [k for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
        if changed:
            raise CheckpointError(
                f"the checkpoint is of a run with another {', '.join(changed)}: "
                f"{[was.get(k) for k in changed]} then, {[now.get(k) for k in changed]} now."
            )
        self.network.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.loss = state["step"], state["loss"]
        self.threads = state.get("threads")  # which checkpoints of earlier versions lack
