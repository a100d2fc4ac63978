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


def as_floats(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in a floating dtype; of bytes, 255 is 1."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


def split(x: Tensor, parts: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers [parts, ...] of ``dtype`` that add up to those of ``x`` [...], or nearly so.

    Each part is what is left of the ones before it, rounded. In bfloat16, which has the range of
    float32 and a third of its bits, three parts make up float32 exactly.

    >>> split(torch.tensor([1.0, 1 + 2**-10]), parts=2).float()
    tensor([[1.0000e+00, 1.0000e+00],
            [0.0000e+00, 9.7656e-04]])
    """
    check_floating("x", x)
    found, rest = [], x.detach()
    for _ in range(parts):
        found.append(rest.to(dtype))
        rest = rest - found[-1].to(rest.dtype)
    return torch.stack(found)


def shape(x: Tensor) -> str:
    """The shape as errors show it: [2, 3]."""
    return "[" + ", ".join(str(s) for s in x.shape) + "]"


def check_floating(name: str, x: Tensor) -> None:
    """Raise ValueError unless ``x`` is floating point."""
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; a floating-point dtype is needed.")


def check_patches(images: Tensor, num_patch: int) -> None:
    """Raise ValueError unless P x P patches cover the images [B, Cin, H, W], of bytes or floats."""
    if images.dim() != 4:
        raise ValueError(f"images are {shape(images)}; they must be [B, Cin, H, W].")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; uint8 or a floating-point dtype fits.")
    H, W = images.shape[2:]
    if num_patch < 1 or H % num_patch or W % num_patch or not H * W:
        raise ValueError(
            f"num_patch is {num_patch} and images are {H} x {W}; it must divide their sides."
        )


def check_no_gradient(operation: str, *tensors: Tensor) -> None:
    """Raise ValueError if a gradient is asked for, of an operation of scoring that has none."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            f"{operation} is given a tensor that requires a gradient, which this operation of "
            "scoring does not have; call it under torch.no_grad()."
        )


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
