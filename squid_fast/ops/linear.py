"""A linear layer of float32 in products of bfloat16: operator and PyTorch implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from .common import check_no_gradient, kernels, operator, shape


def _split_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    high, low = weight.to(x.dtype)
    return F.linear(x, high + low, bias)


@operator(_split_linear_cpu)
def _split_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if dispatch.serves_split_linear(x, weight):
        return kernels("split_linear").forward(x, weight, bias)
    return _split_linear_cpu(x, weight, bias)


@_split_linear.register_fake
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[1])


def split_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(x, weight, bias)`` in float32, by a GPU in three products of half precision.

    For scoring. Rows and weights are sums of a high and a low part in the dtype of the weight, and
    the product of the low parts is left out. In bfloat16 the error of a product is near 2^-16 of
    it, eight bits less than float32's and five bits more than TF32's.

    Args:
        x: [..., T], float32.
        weight: [2, S, T], from ``split``.
        bias: [S], float32.

    Raises:
        ValueError: a shape or dtype does not fit, or a gradient is asked for.

    >>> from squid_fast.ops import split
    >>> weight = split(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), parts=2)
    >>> split_linear(torch.tensor([1.0, 10.0]), weight)
    tensor([21., 43.])
    """
    if weight.dim() != 3 or weight.shape[0] != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[2]:
        raise ValueError(
            f"x is {shape(x)} and weight {shape(weight)}; they must be [..., T] and [2, S, T]."
        )
    if bias is not None and bias.shape != weight.shape[1:2]:
        raise ValueError(f"bias is {shape(bias)}; [{weight.shape[1]}] would fit this weight.")
    for name, given in (("x", x), ("bias", x if bias is None else bias)):
        if given.dtype not in (torch.float32, torch.float64) or given.dtype != x.dtype:
            raise ValueError(f"{name} is {given.dtype}; torch.float32 is needed.")
    check_no_gradient("split_linear", x, weight, *([] if bias is None else [bias]))
    rows = x.reshape(-1, x.shape[-1])
    return _split_linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[1])
