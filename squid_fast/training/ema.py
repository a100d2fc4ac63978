"""A moving average of the discriminator, which is validated and kept in place of the last step's.

Adversarial training circles around the point it converges to, so the published score's AUROC swings
by a tenth and more between epochs. An average of the weights lies in the middle of that circle
(Yazici et al., ICLR 2019, use one for generators). The generator is not averaged: its
reconstructions would be smoother than any that the discriminator saw.
"""

from __future__ import annotations

import copy
from typing import Generic

import torch
from torch import Tensor, nn

from ..utils.devices import Module


class EMA(Generic[Module]):
    """Moving average of a module's parameters and of its running statistics.

    A plain mean at first, in which weights from before training soon count for little; from the
    step on in which the mean would keep more than ``decay`` of itself, exponential.
    PyTorch's ``AveragedModel`` asks the device for its count at every step and keeps ``decay`` of
    the first weights; this one works in a CUDA graph.

    Args:
        decay: largest share of the average that ``update`` keeps, in (0, 1).

    Attributes:
        module: the average, in evaluation mode.
        count: number of updates so far; int64 [], on the module's device.
    """

    def __init__(self, module: Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay is {decay}; it must lie in (0, 1), or be 0 for none.")
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.count = torch.zeros((), dtype=torch.int64, device=next(module.parameters()).device)
        self._live, self._smallest = module, 1 - decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's present weights."""
        self.count += 1
        share = (1 / self.count).clamp_min(self._smallest)  # of the present weights
        average = _floats(self.module)
        change = torch._foreach_sub(_floats(self._live), average)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(average, change)


def _floats(module: nn.Module) -> list[Tensor]:
    """Everything of a state dict but counters."""
    return [value for value in module.state_dict().values() if value.is_floating_point()]
