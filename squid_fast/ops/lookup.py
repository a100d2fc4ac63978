"""The memory lookup as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import vectorised
from ..kernels import dispatch as choice
from .common import check_floating, check_threshold, check_top_k, kernels, shape


@torch.library.custom_op("squid_fast::memory_lookup", mutates_args=())
def _memory_lookup(
    query: Tensor,
    memory: Tensor,
    values: Tensor | None,
    mode: str,
    top_k: int,
    threshold: float,
    keep_scores: bool,
) -> tuple[Tensor, Tensor]:
    """The answer, and the scores [N, B, M] in float32 or wider, empty unless ``keep_scores``.

    Summed are the values, or without them the memory itself; only then there is a gradient.
    """
    arguments = (query, memory, values, mode, top_k, threshold, keep_scores)
    if choice.serves_memory_lookup(query, memory.shape[1], mode, top_k):
        return kernels("memory_lookup").forward(*arguments)
    return vectorised.memory_lookup(*arguments)


@torch.library.custom_op("squid_fast::memory_lookup_backward", mutates_args=())
def _memory_lookup_backward(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    scores: Tensor,
    mode: str,
    top_k: int,
    threshold: float,
    memory_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and memory; the latter is empty unless ``memory_grad``.

    Scores that were not kept are computed again.
    """
    arguments = (grad, query, memory, scores, mode, top_k, threshold, memory_grad)
    if choice.serves_memory_lookup(query, memory.shape[1], mode, top_k):
        return kernels("memory_lookup").backward(*arguments)
    return vectorised.memory_lookup_backward(*arguments)


def _empty_scores(query: Tensor, num_slots: int, keep_scores: bool) -> Tensor:
    B, N, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((N, B, num_slots) if keep_scores else (0,), dtype=dtype)


@_memory_lookup.register_fake
def _(
    query: Tensor,
    memory: Tensor,
    values: Tensor | None,
    mode: str,
    top_k: int,
    threshold: float,
    keep_scores: bool,
) -> tuple[Tensor, Tensor]:
    width = (memory if values is None else values).shape[2]
    answer = query.new_empty(*query.shape[:2], width)
    return answer, _empty_scores(query, memory.shape[1], keep_scores)


@_memory_lookup_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    scores: Tensor,
    mode: str,
    top_k: int,
    threshold: float,
    memory_grad: bool,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), memory.new_empty(memory.shape if memory_grad else (0,))


def _save_lookup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, memory, _, *ctx.parameters, _ = inputs
    ctx.save_for_backward(query, memory, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _lookup_gradients(ctx, grad, _):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    wanted = ctx.needs_input_grad[1]
    gradients = _memory_lookup_backward(grad, *ctx.saved_tensors, *ctx.parameters, wanted)
    return gradients[0], gradients[1] if wanted else None, *(None,) * 5


_memory_lookup.register_autograd(_lookup_gradients, setup_context=_save_lookup)


def memory_lookup(
    query: Tensor,
    memory: Tensor,
    top_k: int | None = None,
    *,
    threshold: float | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Space-aware lookup: patch n of every image asks memory n. Paper section 3.2.

    ``shrink(query . memory^T) . memory`` with Gumbel shrinkage (``top_k``), hard shrinkage
    (``threshold``) or, with neither, the raw dot products as weights. Gradients reach the query
    and, where it requires them, the memory.

    Args:
        query: [B, N, C], or [B, C] for a single memory. Its dtype is the computing dtype.
        memory: [N, M, C], or [M, C].
        top_k: k of ``gumbel_shrinkage``.
        threshold: lambda of ``hard_shrinkage``.
        values: [N, M, V], what is summed in place of the slots, such as their projections; without
            gradients. [M, V] for a single memory.

    Returns:
        Looked-up features [B, N, C] (with ``values`` [B, N, V]; without N for a single memory) in
        the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit, both kinds of shrinkage are asked for, or one is out of
            range; or a gradient is asked for that ``values`` do not have.
    """
    if query.dim() == 2 and memory.dim() == 2:
        single = None if values is None else values[None]
        return memory_lookup(
            query[:, None], memory[None], top_k, threshold=threshold, values=single
        )[:, 0]
    if query.dim() != 3 or memory.dim() != 3:
        raise ValueError(
            f"query is {shape(query)} and memory {shape(memory)}; they must be [B, N, C] and "
            "[N, M, C], or [B, C] and [M, C]."
        )
    if query.shape[1] != memory.shape[0] or query.shape[2] != memory.shape[2]:
        raise ValueError(
            f"query is {shape(query)} and memory {shape(memory)}; a query [B, {memory.shape[0]}, "
            f"{memory.shape[2]}] would fit this memory."
        )
    check_floating("query", query)
    if top_k is not None and threshold is not None:
        raise ValueError(f"top_k={top_k} and threshold={threshold} are both given; give one.")
    if top_k is not None:
        check_top_k(top_k, memory.shape[1])
    if threshold is not None:
        check_threshold(threshold)
    mode = "gumbel" if top_k is not None else "hard" if threshold is not None else "raw"
    # A backward will want the scores again. They are kept where they are fewer than the numbers of
    # the query, which is kept anyway.
    trained = torch.is_grad_enabled() and (query.requires_grad or memory.requires_grad)
    keep_scores = trained and memory.shape[1] <= memory.shape[2]
    memory = memory.to(query.dtype)
    if values is not None:
        values = _checked_values(values, memory, trained).to(query.dtype)
    return _memory_lookup(query, memory, values, mode, top_k or 0, threshold or 0.0, keep_scores)[0]


def _checked_values(values: Tensor, memory: Tensor, trained: bool) -> Tensor:
    if values.dim() != 3 or values.shape[:2] != memory.shape[:2]:
        N, M, _ = memory.shape
        raise ValueError(f"values is {shape(values)}; [{N}, {M}, V] would fit this memory.")
    if trained or (torch.is_grad_enabled() and values.requires_grad):
        raise ValueError(
            "values are given while query, memory or values require a gradient, which such a "
            "lookup does not have; call it under torch.no_grad()."
        )
    return values
