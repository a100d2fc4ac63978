"""The neighbourhood attention as an operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import vectorised
from ..kernels import dispatch as choice
from .common import kernels, shape


@torch.library.custom_op("squid_fast::neighbourhood_attention", mutates_args=())
def _neighbourhood_attention(
    query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor, num_heads: int
) -> Tensor:
    arguments = (query, key, value, pad_key, pad_value, num_heads)
    if choice.serves_neighbourhood_attention(query):
        return kernels("neighbourhood_attention").forward(*arguments)
    return vectorised.neighbourhood_attention(*arguments)


@torch.library.custom_op("squid_fast::neighbourhood_attention_backward", mutates_args=())
def _neighbourhood_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_key: Tensor,
    pad_value: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (grad, query, key, value, pad_key, pad_value, num_heads)
    if choice.serves_neighbourhood_attention(query):
        return kernels("neighbourhood_attention").backward(*arguments)
    return vectorised.neighbourhood_attention_backward(*arguments)


@_neighbourhood_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor, num_heads: int
) -> Tensor:
    return query.new_empty(query.shape)


@_neighbourhood_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_key: Tensor,
    pad_value: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, pad_k, pad_v = (x.new_empty(x.shape) for x in (query, key, value, pad_key, pad_value))
    return q, k, v, pad_k, pad_v


def _save_attention(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.num_heads = inputs
    ctx.save_for_backward(*tensors)


_neighbourhood_attention.register_autograd(
    lambda ctx, grad: (
        *_neighbourhood_attention_backward(grad, *ctx.saved_tensors, ctx.num_heads),
        None,
    ),
    setup_context=_save_attention,
)


def neighbourhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_key: Tensor,
    pad_value: Tensor,
    num_heads: int,
) -> Tensor:
    """Multi-head attention [B, N, C] of each patch of a P x P grid to its eight neighbours.

    Paper section 3.3. A patch never attends to itself. Places outside the grid are attended like
    any other, as published: their key and value are ``pad_key`` and ``pad_value``.

    Args:
        query, key, value: [B, N, C], projected, N = P * P patches row-major.
        pad_key, pad_value: [C].
        num_heads: divides C.

    Raises:
        ValueError: a shape does not fit, N is no square, or C is not divisible by ``num_heads``.
    """
    if query.dim() != 3 or key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"query is {shape(query)}, key {shape(key)} and value {shape(value)}; all three "
            "must be the same [B, N, C]."
        )
    N, C = query.shape[1:]
    if math.isqrt(N) ** 2 != N or N == 0:
        raise ValueError(f"N is {N}; a square grid of patches has 1, 4, 9, 16, ... of them.")
    if num_heads < 1 or C % num_heads:
        raise ValueError(f"C is {C} and num_heads {num_heads}; the heads must divide C.")
    if pad_key.shape != (C,) or pad_value.shape != (C,):
        raise ValueError(
            f"pad_key is {shape(pad_key)} and pad_value {shape(pad_value)}; both must be [{C}]."
        )
    dtype = query.dtype
    return _neighbourhood_attention(
        query, key.to(dtype), value.to(dtype), pad_key.to(dtype), pad_value.to(dtype), num_heads
    )
