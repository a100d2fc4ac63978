"""Random numbers of a seed that leave those of the caller as they are, on GPUs too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .arguments import is_number


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that PyTorch or NumPy cannot take.

    >>> check_seed(-1)
    Traceback (most recent call last):
    ValueError: seed is -1; it must be a whole number from 0 to 2**62 - 1.
    """
    if not (is_number(seed, whole=True) and 0 <= seed <= 2**62 - 1):
        raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 to 2**62 - 1.")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn on the CPU inside is that of the seed.

    ``torch.manual_seed`` would seed every GPU as well, and leave it so.

    >>> with seeded(0):
    ...     first = torch.rand(1)
    >>> with seeded(0):
    ...     assert torch.equal(torch.rand(1), first)
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
