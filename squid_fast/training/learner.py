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
    """Modules in training, their optimisers, and the step that trains them.

    Attributes:
        modules: what a checkpoint holds, by name.
        trained: what the run results in, by name.
        optimizers: their optimisers; the schedule of the recipe sets the rate of the first.
        processes: the processes that train together.
        graphs: whether the steps are captured as CUDA graphs.
    """

    device: torch.device
    modules: Mapping[str, nn.Module]
    trained: Mapping[str, nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    processes = Processes()
    graphs = False

    @abstractmethod
    def step(self, images: Tensor, number: int) -> Losses:
        """Train on images [B, 1, H, W], the batch with that number; returns losses [] by name."""

    def validate(self, images: ImageSet) -> dict[str, dict[str, float]]:
        """AUROCs by name, of what is ``trained`` under "validation"; others are only logged."""
        raise NotImplementedError  # called only in runs with a validation set

    def epoch_seed(self, seed: int, epoch: int) -> int:
        """Seed of the order in which an epoch goes through the images."""
        return step_seed(seed + 1, epoch)

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that this learner is."""
        states: dict[str, Any] = {k: module.state_dict() for k, module in self.modules.items()}
        return states | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)

    def copy(self) -> Learner:
        """A learner whose steps can be timed without training this one."""
        return copy.deepcopy(self)


def step_seed(seed: int, step: int) -> int:
    """A seed of its own for every (seed, step)."""
    return (seed * 0x9E3779B97F4A7C15 + step) % 2**63
