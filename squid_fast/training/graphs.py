"""Training steps as CUDA graphs: the thousand kernels of a step as one launch.

A step of the published batch takes a GPU less time than its launches take the host. Steps of the
same kind (with or without the generator's turn) run the same kernels, so each kind is captured once
and replayed from then on. What may differ from step to step is in tensors: which images, the
learning rate, and the seed, which a replay takes from PyTorch's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inference.graphs import capture

Losses = dict[str, Tensor]
Step = Callable[[Tensor, int], Losses]
Captured = tuple[Callable[[], None], Losses]  # a replay, and the losses that it writes

WARM_UP = 3  # steps of each kind before its capture, in which kernels are chosen and compiled


@dataclass
class _Kind:
    """Steps of one kind: how many ran, and their graph once there is one."""

    count: int = 0
    captured: Captured | None = None
    chosen: Tensor | None = None


class StepGraphs:
    """Runs a training step, after some steps of its kind by replaying a CUDA graph.

    The first steps of a kind are ordinary steps, on a side stream, as a capture needs them to be.
    No step may read a tensor on the host. The tensors that it trains must stay where they are, and
    the optimisers must be capturable, with learning rates in tensors.

    Args:
        step: of the chosen images [B], int64 on the device, and the step's number; returns losses.
        kind: of the step with that number.
        capture: makes a graph of a call, see ``squid_fast.inference.graphs.capture``.
    """

    def __init__(
        self,
        step: Step,
        kind: Callable[[int], Hashable],
        capture: Callable[[Callable[[], Losses], torch.device], Captured] = capture,
    ) -> None:
        self._step, self._kind, self._capture = step, kind, capture
        self._kinds: dict[Hashable, _Kind] = {}

    def __call__(self, chosen: Tensor, number: int) -> Losses:
        """The losses of the step; the next step of its kind writes over them."""
        kind = self._kinds.setdefault(self._kind(number), _Kind())
        kind.count += 1
        if kind.count <= WARM_UP:
            return self._aside(chosen, number)
        if kind.captured is None:
            kind.chosen = given = chosen.clone()
            kind.captured = self._capture(lambda: self._step(given, number), given.device)
        replay, losses = kind.captured
        assert kind.chosen is not None
        kind.chosen.copy_(chosen)
        replay()
        return losses

    def _aside(self, chosen: Tensor, number: int) -> Losses:
        if not chosen.is_cuda:
            return self._step(chosen, number)
        current = torch.cuda.current_stream(chosen.device)
        aside = torch.cuda.Stream(chosen.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            losses = self._step(chosen, number)
        current.wait_stream(aside)
        return losses
