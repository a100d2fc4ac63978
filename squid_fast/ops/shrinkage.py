"""Gumbel and hard shrinkage as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import vectorised
from ..kernels import dispatch as choice
from .common import check_floating, check_threshold, check_top_k, kernels


@torch.library.custom_op("squid_fast::gumbel_shrinkage", mutates_args=())
def _gumbel_shrinkage(logits: Tensor, top_k: int) -> Tensor:
    if choice.serves_gumbel_shrinkage(logits, top_k):
        return kernels("gumbel_shrinkage").forward(logits, top_k)
    return vectorised.gumbel_shrinkage(logits, top_k)


@torch.library.custom_op("squid_fast::gumbel_shrinkage_backward", mutates_args=())
def _gumbel_shrinkage_backward(grad: Tensor, logits: Tensor) -> Tensor:
    if choice.serves_gumbel_shrinkage(logits):
        return kernels("gumbel_shrinkage").backward(grad, logits)
    return vectorised.gumbel_shrinkage_backward(grad, logits)


@torch.library.custom_op("squid_fast::hard_shrinkage", mutates_args=())
def _hard_shrinkage(logits: Tensor, threshold: float) -> Tensor:
    if choice.serves_hard_shrinkage(logits):
        return kernels("gumbel_shrinkage").hard_forward(logits, threshold)
    return vectorised.hard_shrinkage(logits, threshold)


@torch.library.custom_op("squid_fast::hard_shrinkage_backward", mutates_args=())
def _hard_shrinkage_backward(grad: Tensor, logits: Tensor, threshold: float) -> Tensor:
    if choice.serves_hard_shrinkage(logits):
        return kernels("gumbel_shrinkage").hard_backward(grad, logits, threshold)
    return vectorised.hard_shrinkage_backward(grad, logits, threshold)


@_gumbel_shrinkage.register_fake
def _(logits: Tensor, top_k: int) -> Tensor:
    return logits.new_empty(logits.shape)


@_gumbel_shrinkage_backward.register_fake
def _(grad: Tensor, logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


@_hard_shrinkage.register_fake
def _(logits: Tensor, threshold: float) -> Tensor:
    return logits.new_empty(logits.shape)


@_hard_shrinkage_backward.register_fake
def _(grad: Tensor, logits: Tensor, threshold: float) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_logits(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0])
    ctx.parameter = inputs[1]


_gumbel_shrinkage.register_autograd(
    lambda ctx, grad: (_gumbel_shrinkage_backward(grad, *ctx.saved_tensors), None),
    setup_context=_save_logits,
)
_hard_shrinkage.register_autograd(
    lambda ctx, grad: (_hard_shrinkage_backward(grad, *ctx.saved_tensors, ctx.parameter), None),
    setup_context=_save_logits,
)


def gumbel_shrinkage(logits: Tensor, top_k: int) -> Tensor:
    """Weights [..., M] of memory slots: the softmax strictly above its k-th largest, renormalised.

    The gradient is the softmax's own (straight through). Paper section 3.2; as published, k keeps
    k - 1 slots, fewer with ties, k = 1 gives zeros, and no noise is drawn.

    Args:
        logits: [..., M], any floating dtype; selection happens in float32 or wider.
        top_k: k, 1 to M.

    Raises:
        ValueError: ``top_k`` is not between 1 and M, or ``logits`` is not floating point.
    """
    check_floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits is a scalar; it needs a last dimension of M slots.")
    check_top_k(top_k, logits.shape[-1])
    return _gumbel_shrinkage(logits, top_k)


def hard_shrinkage(logits: Tensor, threshold: float) -> Tensor:
    """Weights [..., M]: logits above ``threshold``, L1-normalised, all of it differentiated.

    As in MemAE (Gong et al. 2019); the logits are raw dot products, no softmax.

    Args:
        logits: [..., M], any floating dtype.
        threshold: lambda > 0.

    Raises:
        ValueError: ``threshold`` is not positive and finite, or ``logits`` is not floating point.
    """
    check_floating("logits", logits)
    check_threshold(threshold)
    return _hard_shrinkage(logits, float(threshold))
