"""What the operators share: the way to their kernels, and checks that speak in sentences."""

from __future__ import annotations

import math
from importlib import import_module
from types import ModuleType

from torch import Tensor


def kernels(operation: str) -> ModuleType:
    """The launchers of an operation, imported (and Triton with them) when they are first needed."""
    return import_module(f"squid_fast.kernels.{operation}")


def shape(x: Tensor) -> str:
    """The shape as errors show it: [2, 3]."""
    return "[" + ", ".join(str(s) for s in x.shape) + "]"


def check_floating(name: str, x: Tensor) -> None:
    """Raise ValueError unless ``x`` is floating point."""
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; a floating-point dtype is needed.")


def check_top_k(top_k: int, num_slots: int) -> None:
    """Raise ValueError unless k lies between 1 and M."""
    if not 1 <= top_k <= num_slots:
        raise ValueError(
            f"top_k is {top_k}, but there are {num_slots} memory slots; it must lie between 1 and "
            f"{num_slots}."
        )


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless the threshold is positive and finite."""
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold is {threshold}; it must be positive and finite.")
