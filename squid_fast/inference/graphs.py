"""CUDA graphs: the hundreds of kernels of a call as one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from threading import Lock, RLock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..kernels import dispatch
from ..utils.tf32 import tf32

# PyTorch captures one graph at a time, and the setting of TF32 is that of the whole process.
_capturing = Lock()
_WARM_UP = 3  # calls before a capture, as PyTorch recommends
# Images that take less time at once than in two graphs, of which each has its latency: on an H200
# in float32, one took 2.7 ms and 16 took 11.2.
_FEW = 8

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


def capture(
    call: Callable[[], Result],
    device: torch.device,
    pool: Any = None,
    stream: torch.cuda.Stream | None = None,
) -> tuple[Callable[[], None], Result]:
    """Capture the kernels of a call as a CUDA graph, without running them.

    The call must have run ``aside`` before, and read no tensor on the host. Returned are a function
    that replays the graph, and the call's result, whose tensors a replay overwrites. Graphs that
    share a ``pool`` of memory overwrite each other's tensors too. They need the same ``stream``,
    since what one stream has freed PyTorch gives to no other.
    """
    graph = torch.cuda.CUDAGraph()
    if stream is None:  # PyTorch's own belongs to the first device that captured
        stream = torch.cuda.Stream(device)
    # By default no thread at all might allocate memory meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, pool, stream, "thread_local"):
        result = call()
    return graph.replay, result


def portions(count: int, largest: int) -> Iterator[tuple[int, int]]:
    """How a batch is split into graphs: images of each portion, and images that its graph takes.

    Graphs take powers of two. Places that stay empty cost as much as images, so at most a quarter
    of a graph does, unless it is small.

    >>> list(portions(2500, 1024))
    [(1024, 1024), (1024, 1024), (452, 512)]
    >>> list(portions(300, 1024))
    [(256, 256), (32, 32), (12, 16)]
    """
    while count:
        size = min(1 << (count - 1).bit_length(), largest)
        if count < size and size > _FEW and 4 * count < 3 * size:
            size //= 2
        yield min(count, size), size
        count -= min(count, size)


class _Captured(NamedTuple):
    replay: Callable[[], None]
    given: Tensor
    results: tuple[Tensor, ...]


class Graphs:
    """Replays a function of a CUDA tensor, captured for a few batch sizes, for batches of any size.

    All graphs share one pool of memory, and the stream of their captures, so that together they
    take as much as the largest. What one has computed the next overwrites; hence they run one after
    the other, on one stream at a time, and results have to be copied. None is ever thrown away,
    which would free nothing.

    Args:
        largest: images that a graph takes at most, a power of two.
    """

    def __init__(self, device: torch.device, largest: int) -> None:
        self.device, self.largest = device, largest
        self._captured: dict[Hashable, _Captured] = {}
        self._shared: tuple[Any, torch.cuda.Stream] | None = None  # pool and stream of captures
        self._stream: torch.cuda.Stream | None = None  # of the last replay
        self._turn = RLock()

    def replay(
        self, function: Function, name: Hashable, x: Tensor
    ) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """``function(x)`` in portions: rows of ``x``, and their results, in order.

        The next portion overwrites the results. ``x`` lies on the device or on the host. A graph is
        shared by all functions of the same ``name``, under one setting of ``kernels.use``.
        """
        with self._turn:  # of threads that share a scorer
            current = torch.cuda.current_stream(self.device)
            if self._stream is not None and self._stream != current:
                current.wait_stream(self._stream)
            self._stream, start = current, 0
            for count, size in portions(len(x), self.largest):
                rows = slice(start, start + count)
                replay, given, results = self._of(function, name, x, size)
                # From pinned memory, copying does not keep the host.
                part = x[rows].pin_memory() if x.device.type == "cpu" else x[rows]
                given[:count].copy_(part, non_blocking=True)
                given[count:].zero_()
                replay()
                yield rows, tuple(result[:count] for result in results)
                start += count

    def _of(self, function: Function, name: Hashable, x: Tensor, size: int) -> _Captured:
        key = ((name, dispatch.setting()), size, x.shape[1:], x.dtype)
        if key not in self._captured:
            shape = (size, *x.shape[1:])
            given = torch.zeros(shape, dtype=x.dtype, device=self.device)

            def warm_up() -> None:
                for _ in range(_WARM_UP):
                    function(given)

            with _capturing, tf32(False):
                aside(warm_up, self.device)
                shared = self._shared
                if shared is None:
                    shared = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
                replay, results = capture(lambda: function(given), self.device, *shared)
            self._shared = shared  # the pool lives as long as one graph does
            self._captured[key] = _Captured(replay, given, results)
        return self._captured[key]
