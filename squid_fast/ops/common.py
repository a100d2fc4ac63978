"""What the operators share: how they are registered, and how their arguments are checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

# The operators that occur in exported programs, as ATen operations; each file adds its own.
DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {}


def operator(
    implementation: Callable[..., Any], changes: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register a function as ``squid_fast::<name>``, given ``_<name>_cpu``.

    The schema is the signature of that PyTorch implementation. The function itself only chooses
    between it and a kernel. ``changes`` names the arguments that are written to.
    """
    name = implementation.__name__.removeprefix("_").removesuffix("_cpu")
    schema = torch.library.infer_schema(implementation, mutates_args=changes)
    return torch.library.custom_op(f"squid_fast::{name}", mutates_args=changes, schema=schema)


def kernels(operation: str) -> ModuleType:
    """The launchers of an operation, imported (and Triton with them) when they are first needed."""
    return import_module(f"squid_fast.kernels.{operation}")


def fake_like(x: Tensor, *_: Any) -> Tensor:
    """What most fakes return: a contiguous tensor of the shape of the first argument."""
    return x.new_empty(x.shape)


def wide(x: Tensor) -> Tensor:
    """At least float32: selection and normalisation never happen in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """Gradient of the logits, given that of their softmax over the last dimension."""
    return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


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
