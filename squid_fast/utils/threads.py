"""How many threads PyTorch computes with on a CPU, and how they wait for one another.

At the end of every operation, the threads of OpenMP wait for the last of them, and spin while they
wait. If another process takes the core of one thread, the others spin until that thread has had its
turn. A training step of a thousand short operations then takes many times as long as on one thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .arguments import is_number

SPIN = {
    "GOMP_SPINCOUNT": "20000",  # turns; for GNU's OpenMP, which PyTorch brings on Linux
    "KMP_BLOCKTIME": "1",  # milliseconds; for LLVM's and Intel's OpenMP
}
"""Environment variables of OpenMP libraries that set how long a thread spins before it sleeps."""

WORTH_TIMING = 100  # steps; a run of so many or more chooses its threads by timing
_MOST_THREADS = 1024  # OpenMP ends the program where the system has no room for more
_SECONDS = 1.0  # for which each number of threads is timed


def limit_spinning() -> None:
    """Let waiting threads sleep soon, unless the environment already says how they wait.

    Call it before torch is imported: OpenMP reads the environment when it is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in SPIN.items():
            os.environ.setdefault(name, value)


def waiting() -> str:
    """The variables of the environment that say how threads wait."""
    names = ("OMP_WAIT_POLICY", *SPIN)
    said = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return " ".join(said) or "as OpenMP does by itself"


def check_threads(count: int | None) -> None:
    """Raise ValueError for a number of threads that PyTorch cannot start; None is no number.

    >>> check_threads(0)
    Traceback (most recent call last):
    ValueError: the number of threads is 0; it must lie between 1 and 1024.
    """
    if count is not None and not (is_number(count, whole=True) and 1 <= count <= _MOST_THREADS):
        raise ValueError(
            f"the number of threads is {count!r}; it must lie between 1 and {_MOST_THREADS}."
        )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with that many threads inside the block.

    >>> import torch
    >>> with threads(1):
    ...     torch.get_num_threads()
    1
    """
    import torch  # not at the top: limit_spinning has to run before

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_threads(step: Callable[[], object], most: int) -> int:
    """The number of threads with which ``step`` is fastest at the moment.

    ``most`` is tried first, then half of it and so on, for as long as that is faster. Each number
    is timed for a second, or for one step if that takes longer.
    """
    count = best = most
    least = float("inf")
    while count:
        with threads(count):
            step()  # the first step with a number of threads sets things up
            seconds = _seconds(step)
        if seconds >= least:
            break
        best, least = count, seconds
        count //= 2
    return best


def _seconds(step: Callable[[], object]) -> float:
    """Mean time of a step; not the median, since all steps of a run count."""
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < _SECONDS:
        step()
        steps += 1
    return (time.perf_counter() - started) / steps
