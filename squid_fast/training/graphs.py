"""Training steps as CUDA graphs, which launch the thousand kernels of a step at once.

A step of the published batch takes a GPU less time than its launches take the host. Steps of the
same kind (with or without the generator's turn) run the same kernels, so each kind is captured once
and replayed from then on. What may differ from step to step is in tensors: which images, the
learning rate, and the seed, which a replay takes from PyTorch's generator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..inference.graphs import aside, capture

Losses = dict[str, Tensor]
Step = Callable[[Tensor, int], Losses]
Captured = tuple[Callable[[], None], Losses]  # a replay, and the losses that it writes

WARM_UP = 3  # steps of each kind before its capture, in which kernels are chosen and compiled


class StepGraphs:
    """Runs training steps; after the first few of a kind by replaying a CUDA graph.

    The first steps of a kind are ordinary steps, on a stream of their own as capturing requires.
    Nothing in a step may read a tensor on the host. The tensors that it trains must stay where they
    are, and the optimisers must be capturable, with learning rates in tensors.

    Args:
        step: takes indices of images [B], int64 on the device, and the number of the step, and
            returns losses.
        kind: returns the kind of the step with a number.
    """

    def __init__(
        self,
        step: Step,
        kind: Callable[[int], Hashable],
        capture: Callable[[Callable[[], Losses], torch.device], Captured] = capture,
    ) -> None:
        self._step, self._kind, self._capture = step, kind, capture
        self._counts: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[Tensor, Captured]] = {}  # with the indices they read

    def __call__(self, chosen: Tensor, number: int) -> Losses:
        """Run a step; the next step of its kind overwrites the losses that it returns."""
        kind = self._kind(number)
        self._counts[kind] += 1
        if self._counts[kind] <= WARM_UP:
            if not chosen.is_cuda:
                return self._step(chosen, number)
            return aside(lambda: self._step(chosen, number), chosen.device)
        if kind not in self._graphs:
            own = chosen.clone()
            self._graphs[kind] = own, self._capture(lambda: self._step(own, number), own.device)
        given, (replay, losses) = self._graphs[kind]
        given.copy_(chosen)
        replay()
        return losses
