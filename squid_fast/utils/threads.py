"""How many threads PyTorch computes with on a CPU, and how they wait for one another.

Threads of OpenMP wait at the end of every operation for the last of them, and spin while they do.
Where another process takes the core of one, the others spin until it has had its turn; a short step
of training, of a thousand operations, then takes many times as long as on one thread alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SPIN = {
    "GOMP_SPINCOUNT": "20000",  # turns: GNU's OpenMP, which PyTorch brings on Linux
    "KMP_BLOCKTIME": "1",  # milliseconds: LLVM's and Intel's
}
"""How long a thread spins before it sleeps, by the variables that OpenMP libraries read."""

WORTH_TIMING = 100  # steps of a run from which on its number of threads is chosen by timing
_SECONDS = 1.0  # that steps are timed for with each number of threads


def limit_spinning() -> None:
    """Let waiting threads sleep soon, unless the environment already says how they wait.

    Of effect only before torch is imported: OpenMP reads the environment when it is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in SPIN.items():
            os.environ.setdefault(name, value)


def waiting() -> str:
    """How threads wait here, as the environment says it."""
    names = ("OMP_WAIT_POLICY", *SPIN)
    said = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return " ".join(said) or "as OpenMP does by itself"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch computes with that many threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_threads(step: Callable[[], object], most: int) -> int:
    """The number of threads with which ``step`` takes the least time as the machine is now.

    ``most`` is tried first, then half of it and so on, as long as that is faster. Each is timed
    for a second, or for one step that takes longer.
    """
    count = best = most
    least = float("inf")
    while count:
        with threads(count):
            step()  # the first with this number prepares what the others find
            seconds = _seconds(step)
        if seconds >= least:
            break
        best, least = count, seconds
        count //= 2
    return best


def _seconds(step: Callable[[], object]) -> float:
    """Of a step: the mean, since what counts is how many are done in an hour."""
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < _SECONDS:
        step()
        steps += 1
    return (time.perf_counter() - started) / steps
