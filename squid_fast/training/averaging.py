"""The averaged discriminator: what validation asks and a run keeps, in place of the last step's.

Adversarial training circles round what it converges to, so the published score's AUROC swings by a
tenth and more from one epoch to the next. An exponential moving average of the discriminator's
weights sits in the middle of that circle (as Yazici et al., ICLR 2019, do for generators), and
judges what all the discriminators of the last epochs would. The generator is not averaged: the
average of its weights paints smoother than it does, which the discriminator never saw. Training
itself does not change.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Exponential moving average of a module's parameters and of its running statistics.

    PyTorch's ``AveragedModel`` is the same, but asks the device for its count at every step.

    Args:
        module: in training; the average starts from what it is now.
        decay: share of the average that ``update`` keeps, in (0, 1).

    Attributes:
        module: the average, in evaluation mode.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"averaging is {decay}; it must lie in (0, 1), or be 0 for none.")
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._live = module
        self._move = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Move the average towards the module as it is now."""
        average, live = _floats(self.module), _floats(self._live)
        self._move(average, live, torch.empty(0))  # the count of updates is not used


def _floats(module: nn.Module) -> list[Tensor]:
    """Everything of a state dict but counters."""
    return [value for value in module.state_dict().values() if value.is_floating_point()]
