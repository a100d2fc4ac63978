"""What a run trains: the interface between the training loop and a model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageSet
from .distributed import Processes
from .graphs import Losses
from .step import load_optimizer


class Learner(ABC):
    """Modules in training, their optimisers, and the step that moves them.

    Args:
        device: the device that the modules are on.
        modules: what a checkpoint holds, by name.
        optimizers: their optimisers; the schedule of the recipe sets the rate of the first.
        trained: what the run results in, by name; the ``modules`` unless given.
        processes: the processes that train together.
        graphs: whether the steps are captured as CUDA graphs.
    """

    def __init__(
        self,
        device: torch.device,
        modules: Mapping[str, nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        trained: Mapping[str, nn.Module] | None = None,
        processes: Processes | None = None,
        graphs: bool = False,
    ) -> None:
        self.device, self.graphs = device, graphs
        self.modules, self.optimizers = modules, optimizers
        self.trained = trained or modules
        self.processes = processes or Processes()

    @abstractmethod
    def step(self, images: Tensor, number: int) -> Losses:
        """Train on images [B, 1, H, W], the batch of that number; the losses [] by name."""

    def validate(self, images: ImageSet) -> dict[str, dict[str, float]]:
        """AUROCs by name: of what is ``trained`` as "validation", of anything else beside it."""
        return {}

    def epoch_seed(self, seed: int, epoch: int) -> int:
        """The seed of the order in which an epoch takes the images."""
        return step_seed(seed + 1, epoch)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this learner."""
        states: dict[str, Any] = {k: module.state_dict() for k, module in self.modules.items()}
        return states | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)

    def copy(self) -> Learner:
        """A learner whose steps leave this one as it is, to time them."""
        return copy.deepcopy(self)


def step_seed(seed: int, step: int) -> int:
    """A seed of its own for every (seed, step)."""
    return (seed * 0x9E3779B97F4A7C15 + step) % 2**63
