"""SQUID as a learner: generator and discriminator, on one process or several."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageSet
from ..inference import Scorer
from ..inference.scores import SCORES
from ..metrics import image_auroc
from ..modules import SQUID, Discriminator, discriminator_size, freeze_cancelled_biases
from ..utils.devices import Precision, choose_layout, to_layout
from ..utils.extras import require
from ..utils.seeds import seeded
from .distributed import Processes, synchronise_batch_norm
from .ema import EMA
from .graphs import Losses
from .half_weights import HalfWeights
from .learner import Learner
from .state import Settings
from .step import Trainer, make_optimizers


class SquidLearner(Learner):
    """A SQUID and a new discriminator in training; Lightning Fabric carries device and precision.

    Training starts from the weights of ``model``. With several processes Fabric chooses a device
    for each; a copy shares the ``fabric`` of its original. ``sync_batch_norm`` and ``graphs`` are
    those of ``squid_fast.training.train``.
    """

    ema: EMA[Discriminator] | None = None

    def __init__(
        self,
        model: SQUID,
        settings: Settings,
        device: torch.device,
        processes: Processes | None = None,
        sync_batch_norm: bool = True,
        graphs: bool = True,
        fabric: Any = None,
    ) -> None:
        self.processes = processes = processes or Processes()
        self.fabric = fabric or require("lightning_fabric", "train").Fabric(
            accelerator=device.type,
            precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
            **processes.fabric_arguments(device),
        )
        if processes.count > 1:
            self.fabric.launch()
            device = self.fabric.device
        self.device, self._settings = device, settings
        with seeded(settings.seed), torch.device("cpu"):
            discriminator = Discriminator(discriminator_size(model.image_size))
        self.model, self.discriminator = model.train(), discriminator.train()
        self.layout = choose_layout(settings.model["features_root"])
        to_layout(model.to(device), self.layout)
        to_layout(discriminator.to(device), self.layout)
        if processes.count > 1 and sync_batch_norm:
            synchronise_batch_norm(model, device)
            synchronise_batch_norm(discriminator, device)
        for module in (model, discriminator):
            freeze_cancelled_biases(module)
        self.graphs = graphs and device.type == "cuda" and processes.count == 1
        adams = make_optimizers(model, discriminator, settings.recipe, self.graphs)
        calls: list[nn.Module] = [model, discriminator]
        if settings.precision == "bf16" and processes.count == 1:
            # Several exchange the gradient of a weight as soon as it is there, not of all at once.
            calls = [HalfWeights(module) for module in calls]
        (generator_call, generator_adam), (discriminator_call, discriminator_adam) = (
            self.fabric.setup(call, adam) for call, adam in zip(calls, adams, strict=True)
        )
        self.optimizers = generator_adam, discriminator_adam
        self.modules = {"generator": model, "discriminator": discriminator}
        self.trained_discriminator = discriminator
        if settings.recipe.ema_decay:
            self.ema = EMA(discriminator, settings.recipe.ema_decay)
            self.modules["average"] = self.trained_discriminator = self.ema.module
        self.trained = {"generator": model, "discriminator": self.trained_discriminator}
        frozen = self._frozen_discriminator if processes.count > 1 else None
        self.trainer = Trainer(
            generator_call, discriminator_call, self.optimizers, settings.recipe,
            self.fabric.backward, self.ema, frozen,
        )  # fmt: skip

    def step(self, images: Tensor, number: int) -> Losses:
        return self.trainer.step(images.to(memory_format=self.layout), number)

    def validate(self, images: ImageSet) -> dict[str, dict[str, float]]:
        """AUROCs of the scores; with a moving average also the "unaveraged" discriminator's."""
        discriminators = {"validation": self.trained_discriminator}
        if self.ema is not None:
            discriminators["unaveraged"] = self.discriminator
        return {
            name: validate(self.model, discriminator, images, self._settings.precision)
            for name, discriminator in discriminators.items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        if self.ema is not None:
            self.ema.count.fill_(state["step"])

    def copy(self) -> SquidLearner:
        model = copy.deepcopy(self.model)  # Fabric's wrappers around it cannot be copied
        return SquidLearner(model, self._settings, self.device, fabric=self.fabric)

    def _frozen_discriminator(self, images: Tensor) -> Tensor:
        with self.fabric.autocast():
            return self.discriminator(images)


def validate(
    model: SQUID, discriminator: Discriminator, images: ImageSet, precision: Precision
) -> dict[str, float]:
    """AUROC by name of the scores that need no calibration; both modules stay in training mode."""
    device = next(model.parameters()).device
    scorer = Scorer(model, discriminator, precision=precision, device=device)
    raw = scorer.raw_scores(images, [name for name in SCORES if name != "patch_error"])
    return {
        f"auroc_{name}": image_auroc(images.labels.numpy(), SCORES[name][0] * values.numpy())
        for name, values in raw.items()
    }
