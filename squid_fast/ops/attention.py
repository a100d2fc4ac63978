"""The neighbourhood attention: operator, PyTorch implementation, gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels import dispatch
from .common import DECOMPOSITIONS, fake_like, kernels, operator, shape, softmax_backward, wide


def _neighbour_bias(P: int, like: Tensor) -> Tensor:
    """[N, N + 1]: 0 for a neighbour, -inf for none; last column the log count of places outside.

    What lies outside the grid is the same key each time, so its e^score counts that many times.
    """
    place = torch.arange(P, device=like.device)
    near = (place[:, None] - place[None]).abs() <= 1  # [P, P], along one axis
    N = P * P
    near = (near[:, None, :, None] & near[None, :, None, :]).view(N, N)
    near = near & ~torch.eye(N, dtype=torch.bool, device=like.device)
    outside = (8 - near.sum(dim=1, keepdim=True)).to(like.dtype).log()
    inside = torch.zeros(N, N, dtype=like.dtype, device=like.device)
    return torch.cat([inside.masked_fill(~near, -math.inf), outside], dim=1)


def _with_pad(x: Tensor, pad: Tensor, num_heads: int) -> Tensor:
    """[B, N, C] and [C] -> [B, heads, N + 1, C / heads]."""
    B, N, C = x.shape
    x = torch.cat([x, pad.expand(B, 1, C)], dim=1)
    return x.view(B, N + 1, num_heads, C // num_heads).transpose(1, 2)


def _attention_weights(query: Tensor, key: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Queries by head [B, heads, N, d] and softmax weights [B, heads, N, N + 1]."""
    B, N, C = query.shape
    d = C // num_heads
    q = query.reshape(B, N, num_heads, d).transpose(1, 2)
    scores = wide(q @ key.transpose(-2, -1)) / math.sqrt(d)
    return q, torch.softmax(scores + _neighbour_bias(math.isqrt(N), scores), dim=-1)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2).contiguous()


def _neighbourhood_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor, num_heads: int
) -> Tensor:
    _, weights = _attention_weights(query, _with_pad(key, pad_key, num_heads), num_heads)
    return _merge_heads(weights.to(value.dtype) @ _with_pad(value, pad_value, num_heads))


def _neighbourhood_attention_backward_cpu(
    grad: Tensor,
    query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor, num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, N, C = query.shape
    k, v = _with_pad(key, pad_key, num_heads), _with_pad(value, pad_value, num_heads)
    q, weights = _attention_weights(query, k, num_heads)
    g = grad.reshape(B, N, num_heads, C // num_heads).transpose(1, 2)
    grad_v = _merge_heads(weights.to(g.dtype).transpose(-2, -1) @ g)
    grad_scores = softmax_backward(wide(g @ v.transpose(-2, -1)), weights)
    grad_scores = (grad_scores / math.sqrt(C // num_heads)).to(q.dtype)
    grad_q = _merge_heads(grad_scores @ k)
    grad_k = _merge_heads(grad_scores.transpose(-2, -1) @ q)
    of_pads = grad_k[:, N].sum(dim=0), grad_v[:, N].sum(dim=0)
    return grad_q, grad_k[:, :N].contiguous(), grad_v[:, :N].contiguous(), *of_pads


@operator(_neighbourhood_attention_cpu)
def _neighbourhood_attention(query: Tensor, *rest: Any) -> Tensor:
    if dispatch.serves_neighbourhood_attention(query):
        return kernels("neighbourhood_attention").forward(query, *rest)
    return _neighbourhood_attention_cpu(query, *rest)


@operator(_neighbourhood_attention_backward_cpu)
def _neighbourhood_attention_backward(
    grad: Tensor, query: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if dispatch.serves_neighbourhood_attention(query):
        return kernels("neighbourhood_attention").backward(grad, query, *rest)
    return _neighbourhood_attention_backward_cpu(grad, query, *rest)


_neighbourhood_attention.register_fake(fake_like)
_neighbourhood_attention_backward.register_fake(
    lambda grad, *inputs: tuple(map(fake_like, inputs[:-1]))  # all but the number of heads
)


def _save_attention(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.num_heads = inputs
    ctx.save_for_backward(*tensors)


_neighbourhood_attention.register_autograd(
    lambda ctx, grad: (
        *_neighbourhood_attention_backward(grad, *ctx.saved_tensors, ctx.num_heads),
        None,
    ),
    setup_context=_save_attention,
)

DECOMPOSITIONS[torch.ops.squid_fast.neighbourhood_attention.default] = _neighbourhood_attention_cpu


def neighbourhood_attention(
    query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor, num_heads: int
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

    >>> zeros, ones, pad = torch.zeros(1, 4, 1), torch.ones(1, 4, 1), torch.zeros(1)
    >>> answer = neighbourhood_attention(zeros, zeros, ones, pad, pad, num_heads=1)
    >>> answer.flatten()  # three of eight neighbours lie inside a grid of 2 x 2
    tensor([0.3750, 0.3750, 0.3750, 0.3750])
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
