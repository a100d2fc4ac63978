"""How long a call takes: by the clock on a CPU, in CUDA graphs on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

GRAPH_SECONDS = 300e-6  # of work in a graph, beside which the gap in front of it vanishes
LARGEST_GRAPH = 50  # calls
LARGEST_COLD_GRAPH = 10  # calls, each behind a read of some 0.1 ms
REPEATS = 25
WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one for each repeat."""

    warm: list[float]  # of the call again and again, on the same tensors
    cold: list[float]  # with its inputs evicted from the L2 cache before each call; none on a CPU

    @property
    def median(self) -> float:
        return statistics.median(self.warm)

    @property
    def spread(self) -> float:
        """Interquartile range of the warm times."""
        if len(self.warm) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.warm, n=4, method="inclusive")
        return high - low


def on_cpu(call: Call, seconds: float = 0.3, least: int = 5) -> Timing:
    """Times by the clock, for that many seconds and at least that many calls."""
    call()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        times.append(clock_seconds(call))
    return Timing(times, [])


def clock_seconds(call: Call) -> float:
    """Seconds of one call by the clock of the host."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def event_seconds(call: Call) -> float:
    """Seconds of one call between two events on the stream of the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _graph(call: Call) -> torch.cuda.CUDAGraph:
    """The call in a CUDA graph, after warming it up as capturing asks for."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(WARM_UP):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def graph_seconds(call: Call, device: torch.device, repeats: int = REPEATS) -> float:
    """Median seconds of a call in a CUDA graph of its own; on a CPU, of a call by the clock."""
    if device.type == "cpu":
        return on_cpu(call, seconds=0, least=1).median
    graph = _graph(call)
    return statistics.median(event_seconds(graph.replay) for _ in range(repeats))


def _flush() -> Call:
    """A call that reads four times as much as the L2 cache holds."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    size = 4 * max(getattr(properties, "L2_cache_size", 0), 2**24)
    buffer, into = torch.ones(size // 4, device="cuda"), torch.empty((), device="cuda")
    return lambda: torch.sum(buffer, dim=0, out=into)


def on_cuda(call: Call, repeats: int = REPEATS) -> Timing:
    """Times in CUDA graphs of n calls, by events, so that no launch waits for the host.

    Warm is a graph of n calls, divided by n. Cold is the difference of two graphs that are replayed
    in turn, divided by n: one reads a buffer four times as large as the L2 cache before each of n
    calls, the other only reads the buffer n times. Reading, not writing, so that the call does not
    pay for writing the buffer's lines back.
    """
    single = _graph(call)
    seconds = min(event_seconds(single.replay) for _ in range(3))
    count = max(1, min(LARGEST_GRAPH, round(GRAPH_SECONDS / seconds)))
    graph = single if count == 1 else _graph(lambda: [call() for _ in range(count)])
    warm = [event_seconds(graph.replay) / count for _ in range(repeats)]
    del graph, single
    flush, count = _flush(), min(count, LARGEST_COLD_GRAPH)
    both = _graph(lambda: [(flush(), call()) for _ in range(count)])
    flushes = _graph(lambda: [flush() for _ in range(count)])
    pairs = ((event_seconds(both.replay), event_seconds(flushes.replay)) for _ in range(repeats))
    return Timing(warm, [max(with_call - without, 0.0) / count for with_call, without in pairs])
