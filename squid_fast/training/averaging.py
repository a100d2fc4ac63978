"""Averaged weights: what is validated and kept instead of the last step's.

Adversarial training circles round what it converges to: from one epoch to the next the published
score's AUROC swings by a tenth and more. An exponential moving average of both networks' weights
sits in the middle of that circle (Yazici et al., ICLR 2019). Training itself does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..data import ImageSet
from ..modules import SQUID, Discriminator, MemoryQueue

_REFRESH_IMAGES = 256  # of the training set: all slots of a published queue, and steady statistics

Module = TypeVar("Module", bound=nn.Module)


class Averages:
    """Exponential moving averages of the weights of generator and discriminator.

    Each network's average moves when its optimiser does. Buffers are not averaged: statistics of
    batch norm and the slots of memory queues belong to the weights that made them, so
    ``refreshed`` makes them anew, from training images, for the averaged weights.

    Args:
        model, discriminator: on their device; the averages start from their weights.
        decay: share of an average that a step keeps, in [0, 1).
    """

    def __init__(self, model: SQUID, discriminator: Discriminator, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"averaging is {decay}; it must lie in [0, 1), 0 for no averaging.")
        self._live = {"generator": model, "discriminator": discriminator}
        self._weights = {
            name: [p.detach().clone() for p in module.parameters()]
            for name, module in self._live.items()
        }
        self._move = get_ema_multi_avg_fn(decay)

    def update(self, name: str) -> None:
        """Move the average of "generator" or "discriminator" towards its weights as they are."""
        live = [p.detach() for p in self._live[name].parameters()]
        self._move(self._weights[name], live, torch.empty(0))  # the count is not used

    @torch.no_grad()
    def refreshed(
        self,
        images: ImageSet,
        batch_size: int,
        layout: torch.memory_format,
        precision: Callable[[], Any],
    ) -> tuple[SQUID, Discriminator]:
        """Copies with the averaged weights, in evaluation mode, their buffers made from images.

        As in training, the discriminator sees batches of real and of painted images in turn, and
        the queues the features of every batch.

        Args:
            images: the training set, of which some evenly chosen ones are used.
            batch_size: as in training.
            layout: of the images.
            precision: makes the context in which the networks compute.
        """
        model, judge = (self._copy(name) for name in self._live)
        assert isinstance(model, SQUID)
        assert isinstance(judge, Discriminator)
        norms = [m for m in (*model.modules(), *judge.modules()) if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over all batches
        queues = [module for module in model.modules() if isinstance(module, MemoryQueue)]
        chosen = torch.arange(0, len(images), max(1, len(images) // _REFRESH_IMAGES))
        chosen = chosen[: max(batch_size, _REFRESH_IMAGES // batch_size * batch_size)]
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)  # masks are drawn as in training, but always the same
            for part in chosen.split(batch_size):
                if len(part) < batch_size:
                    continue  # statistics of a smaller batch are another thing
                batch = images.batch(part, device).to(memory_format=layout)
                with precision():
                    recon = model(batch, teacher=False)["recon"]
                    judge(batch), judge(recon)
                for queue in queues:
                    queue.update()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return model.eval(), judge.eval()

    def state_dict(self) -> dict[str, list[Tensor]]:
        return dict(self._weights)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for name, weights in self._weights.items():
            for ours, theirs in zip(weights, state[name], strict=True):
                ours.copy_(theirs)

    def _copy(self, name: str) -> nn.Module:
        module = copy.deepcopy(self._live[name]).train()
        for p, average in zip(module.parameters(), self._weights[name], strict=True):
            p.copy_(average)
        return module
