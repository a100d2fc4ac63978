"""CUDA graphs: the hundreds of kernels of a call as one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_WARM_UP = 3  # calls before a capture, as PyTorch recommends
_MOST = 8  # graphs kept; each holds the memory of its activations

Function = Callable[[Tensor], tuple[Tensor, ...]]
Result = TypeVar("Result")


def aside(call: Callable[[], Result], device: torch.device) -> Result:
    """The call's result, computed on a stream of its own, as calls before a capture have to be."""
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = call()
    current.wait_stream(stream)
    return result


def capture(call: Callable[[], Result], device: torch.device) -> tuple[Callable[[], None], Result]:
    """Capture the kernels of a call as a CUDA graph, without running them.

    The call must have run ``aside`` before, and read no tensor on the host. Returned are a function
    that replays the graph, and the call's result, whose tensors a replay overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # PyTorch's own belongs to the first device that captured
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        result = call()
    return graph.replay, result


class _Captured(NamedTuple):
    replay: Callable[[], None]
    given: Tensor
    results: tuple[Tensor, ...]


class Graphs:
    """Captures a function of one CUDA tensor once for every shape, and replays it from then on."""

    def __init__(self) -> None:
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()

    def __call__(self, function: Function, name: Hashable, x: Tensor) -> tuple[Tensor, ...]:
        """``function(x)``; a graph is shared by all functions of the same ``name``."""
        key = (name, x.shape, x.dtype)
        if key not in self._captured:
            while len(self._captured) >= _MOST:
                self._captured.popitem(last=False)
            self._captured[key] = _warm_and_capture(function, x)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        captured.given.copy_(x)
        captured.replay()
        return tuple(result.clone() for result in captured.results)


def _warm_and_capture(function: Function, x: Tensor) -> _Captured:
    given = x.clone()

    def warm_up() -> None:
        for _ in range(_WARM_UP):
            function(given)

    aside(warm_up, x.device)
    replay, results = capture(lambda: function(given), x.device)
    return _Captured(replay, given, results)
