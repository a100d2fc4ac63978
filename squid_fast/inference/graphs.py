"""CUDA graphs: a network's hundred kernels as one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

_WARM_UP = 3  # calls before capture, as PyTorch asks for
_MOST = 8  # graphs kept; each holds the memory of its activations

Function = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    given: Tensor
    results: tuple[Tensor, ...]


class Graphs:
    """Captures a function of one CUDA tensor once for every shape, and replays it from then on."""

    def __init__(self) -> None:
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()

    def __call__(self, function: Function, name: Hashable, x: Tensor) -> tuple[Tensor, ...]:
        """``function(x)``; functions of the same ``name`` are taken to be the same."""
        key = (name, x.shape, x.dtype)
        if key not in self._captured:
            while len(self._captured) >= _MOST:
                self._captured.popitem(last=False)
            self._captured[key] = _capture(function, x)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        captured.given.copy_(x)
        captured.graph.replay()
        return tuple(result.clone() for result in captured.results)


def _capture(function: Function, x: Tensor) -> _Captured:
    given = x.clone()
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            function(given)
    torch.cuda.current_stream(x.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(given)
    return _Captured(graph, given, results)
