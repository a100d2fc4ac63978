"""Shrinkage and the memory lookup: operators, PyTorch implementations, gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from .common import (
    DECOMPOSITIONS,
    check_floating,
    check_threshold,
    check_top_k,
    fake_like,
    kernels,
    operator,
    shape,
    softmax_backward,
    wide,
)

EPSILON = 1e-12  # floor of the published normalisations


def _keep_above(values: Tensor, threshold: Tensor | float) -> Tensor:
    distance = values - threshold
    kept = distance.relu() * values / (distance.abs() + EPSILON)
    return kept / kept.sum(dim=-1, keepdim=True).clamp_min(EPSILON)


def _largest(probabilities: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gumbel weights of the k largest probabilities [..., M] and their slots, largest first."""
    values, slots = probabilities.topk(top_k, dim=-1)
    return _keep_above(values, values[..., -1:]), slots


def _gumbel_weights(probabilities: Tensor, top_k: int) -> Tensor:
    threshold = probabilities.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return _keep_above(probabilities, threshold)


def _hard_backward(grad: Tensor, logits: Tensor, threshold: float) -> Tensor:
    # kept = u * a / (u + eps) for u = a - threshold > 0, else 0; weights = kept / max(sum, eps).
    u = (logits - threshold).relu()
    inverse = 1 / (u + EPSILON)
    kept = u * logits * inverse
    total = kept.sum(dim=-1, keepdim=True)
    floor = total.clamp_min(EPSILON)
    through_total = (grad * kept).sum(dim=-1, keepdim=True) / floor.square()
    grad_kept = grad / floor - torch.where(total > EPSILON, through_total, 0.0)
    slope = (logits + u) * inverse - kept * inverse
    return torch.where(u > 0, grad_kept * slope, 0.0)


def _gumbel_shrinkage_cpu(logits: Tensor, top_k: int) -> Tensor:
    weights = _gumbel_weights(torch.softmax(wide(logits), dim=-1), top_k)
    return weights.to(logits.dtype).contiguous()


def _gumbel_shrinkage_backward_cpu(grad: Tensor, logits: Tensor) -> Tensor:
    probabilities = torch.softmax(wide(logits), dim=-1)
    return softmax_backward(wide(grad), probabilities).to(logits.dtype).contiguous()


def _hard_shrinkage_cpu(logits: Tensor, threshold: float) -> Tensor:
    return _keep_above(wide(logits), threshold).to(logits.dtype).contiguous()


def _hard_shrinkage_backward_cpu(grad: Tensor, logits: Tensor, threshold: float) -> Tensor:
    return _hard_backward(wide(grad), wide(logits), threshold).to(logits.dtype).contiguous()


@operator(_gumbel_shrinkage_cpu)
def _gumbel_shrinkage(logits: Tensor, top_k: int) -> Tensor:
    if dispatch.serves_gumbel_shrinkage(logits, top_k):
        return kernels("gumbel_shrinkage").forward(logits, top_k)
    return _gumbel_shrinkage_cpu(logits, top_k)


@operator(_gumbel_shrinkage_backward_cpu)
def _gumbel_shrinkage_backward(grad: Tensor, logits: Tensor) -> Tensor:
    if dispatch.serves_gumbel_shrinkage(logits):
        return kernels("gumbel_shrinkage").backward(grad, logits)
    return _gumbel_shrinkage_backward_cpu(grad, logits)


@operator(_hard_shrinkage_cpu)
def _hard_shrinkage(logits: Tensor, threshold: float) -> Tensor:
    if dispatch.serves_hard_shrinkage(logits):
        return kernels("gumbel_shrinkage").hard_forward(logits, threshold)
    return _hard_shrinkage_cpu(logits, threshold)


@operator(_hard_shrinkage_backward_cpu)
def _hard_shrinkage_backward(grad: Tensor, logits: Tensor, threshold: float) -> Tensor:
    if dispatch.serves_hard_shrinkage(logits):
        return kernels("gumbel_shrinkage").hard_backward(grad, logits, threshold)
    return _hard_shrinkage_backward_cpu(grad, logits, threshold)


_gumbel_shrinkage.register_fake(fake_like)
_gumbel_shrinkage_backward.register_fake(lambda grad, logits: fake_like(logits))
_hard_shrinkage.register_fake(fake_like)
_hard_shrinkage_backward.register_fake(lambda grad, logits, threshold: fake_like(logits))


def _save_logits(ctx: Any, inputs: Any, output: Any) -> None:
    logits, ctx.parameter = inputs
    ctx.save_for_backward(logits)


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
    k - 1 slots, fewer with ties, k = 1 gives zeros, and no noise is drawn. Selection happens in
    float32 or wider, whatever the floating dtype of the logits.

    Raises:
        ValueError: ``top_k`` is not between 1 and M, or ``logits`` is not floating point.

    >>> logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    >>> gumbel_shrinkage(logits, top_k=3)  # keeps 2 slots: 3/7 and 4/7
    tensor([0.0000, 0.0000, 0.4286, 0.5714])
    """
    check_floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits is a scalar; it needs a last dimension of M slots.")
    check_top_k(top_k, logits.shape[-1])
    return _gumbel_shrinkage(logits, top_k)


def hard_shrinkage(logits: Tensor, threshold: float) -> Tensor:
    """Weights [..., M]: logits above ``threshold``, L1-normalised, all of it differentiated.

    As in MemAE (Gong et al. 2019); the logits are raw dot products of any floating dtype, no
    softmax.

    Raises:
        ValueError: ``threshold`` is not positive and finite, or ``logits`` is not floating point.

    >>> hard_shrinkage(torch.tensor([0.5, 1.0, 1.5, 2.5]), threshold=1.0)
    tensor([0.0000, 0.0000, 0.3750, 0.6250])
    """
    check_floating("logits", logits)
    check_threshold(threshold)
    return _hard_shrinkage(logits, float(threshold))


def _scores(x: Tensor, memory: Tensor) -> Tensor:
    """Dot products [N, B, M] of x [B, N, C] with the slots of its place, at least float32."""
    if x.shape[0] < 16:
        return wide(torch.bmm(x.transpose(0, 1), memory.mT))
    # With the slots as rows, BLAS takes 0.7 to 1.0 of the time from 16 images on (2 cores, AVX512;
    # C from 1024 to 8192), and up to 2.4 times as long for fewer.
    return wide(torch.bmm(memory, x.permute(1, 2, 0))).mT.contiguous()


def _combine(weights: Tensor, memory: Tensor) -> Tensor:
    """Sums [B, N, C] of all slots, weighted by ``weights`` [N, B, M]."""
    answer = memory.new_empty(weights.shape[1], memory.shape[0], memory.shape[2])
    torch.bmm(weights, memory, out=answer.transpose(0, 1))
    return answer


def _gather(slots: Tensor, weights: Tensor, memory: Tensor) -> Tensor:
    """Weighted sums [B, N, C] of the slots chosen by ``slots`` [N, B, k], largest weight first."""
    N, M, C = memory.shape
    if slots.shape[2] > 1:  # the k-th has no weight
        slots, weights = slots[..., :-1], weights[..., :-1]
    slots = slots + torch.arange(0, N * M, M, device=slots.device)[:, None, None]
    bags, weights = (x.transpose(0, 1).flatten(0, 1) for x in (slots, weights.to(memory.dtype)))
    table = memory.reshape(N * M, C)
    answer = F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights)
    return answer.view(-1, N, C)


def _memory_lookup_cpu(
    query: Tensor, memory: Tensor, values: Tensor | None,
    mode: str, top_k: int, threshold: float, keep_scores: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The answer, and the scores [N, B, M] in float32 or wider, empty unless ``keep_scores``.

    The values are summed, or without them the memory itself, and only then is there a gradient.
    """
    scores = _scores(query, memory)
    values = memory if values is None else values
    kept_scores = scores if keep_scores else scores.new_empty(0)
    if mode == "gumbel":
        weights, slots = _largest(torch.softmax(scores, dim=-1), top_k)
        return _gather(slots, weights, values), kept_scores
    weights = _keep_above(scores, threshold) if mode == "hard" else scores
    return _combine(weights.to(values.dtype), values), kept_scores


def _memory_lookup_backward_cpu(
    grad: Tensor, query: Tensor, memory: Tensor, scores: Tensor,
    mode: str, top_k: int, threshold: float, memory_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of query and memory; the latter is empty unless ``memory_grad``."""
    logits = scores if scores.numel() else _scores(query, memory)
    probabilities = torch.softmax(logits, dim=-1) if mode == "gumbel" else logits
    grad_logits = _scores(grad, memory)
    if mode == "gumbel":
        grad_logits = softmax_backward(grad_logits, probabilities)
    elif mode == "hard":
        grad_logits = _hard_backward(grad_logits, logits, threshold)
    grad_logits = grad_logits.to(memory.dtype)
    grad_query = _combine(grad_logits, memory)
    if not memory_grad:
        return grad_query, memory.new_empty(0)
    weights = logits
    if mode == "gumbel":
        weights = _gumbel_weights(probabilities, top_k)
    elif mode == "hard":
        weights = _keep_above(logits, threshold)
    weights = weights.to(memory.dtype)
    grad_memory = torch.bmm(weights.transpose(1, 2), grad.transpose(0, 1))
    return grad_query, grad_memory.baddbmm_(grad_logits.transpose(1, 2), query.transpose(0, 1))


@operator(_memory_lookup_cpu)
def _memory_lookup(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, memory, _, mode, top_k, *_ = arguments
    if dispatch.serves_memory_lookup(query, memory.shape[1], mode, top_k):
        return kernels("memory_lookup").forward(*arguments)
    return _memory_lookup_cpu(*arguments)


@operator(_memory_lookup_backward_cpu)
def _memory_lookup_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, query, memory, _, mode, top_k, *_ = arguments
    if dispatch.serves_memory_lookup(query, memory.shape[1], mode, top_k):
        return kernels("memory_lookup").backward(*arguments)
    return _memory_lookup_backward_cpu(*arguments)


@_memory_lookup.register_fake
def _(query, memory, values, mode, top_k, threshold, keep_scores):  # type: ignore[no-untyped-def]
    (B, N, _), M = query.shape, memory.shape[1]
    answer = query.new_empty(B, N, (memory if values is None else values).shape[2])
    dtype = torch.promote_types(query.dtype, torch.float32)
    return answer, query.new_empty((N, B, M) if keep_scores else (0,), dtype=dtype)


_memory_lookup_backward.register_fake(
    lambda grad, query, memory, scores, mode, top_k, threshold, memory_grad: (
        fake_like(query),
        memory.new_empty(memory.shape if memory_grad else (0,)),
    )
)


def _save_lookup(ctx: Any, inputs: Any, output: Any) -> None:
    query, memory, _, *ctx.parameters, _ = inputs
    ctx.save_for_backward(query, memory, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _lookup_gradients(ctx: Any, grad: Tensor | None, _: Any) -> Any:
    if grad is None:
        return (None,) * 7
    wanted = ctx.needs_input_grad[1]
    gradients = _memory_lookup_backward(grad, *ctx.saved_tensors, *ctx.parameters, wanted)
    return gradients[0], gradients[1] if wanted else None, *(None,) * 5


_memory_lookup.register_autograd(_lookup_gradients, setup_context=_save_lookup)


def _memory_lookup_in_graphs(
    query: Tensor, memory: Tensor, values: Tensor | None,
    mode: str, top_k: int, threshold: float | Tensor, keep_scores: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``_memory_lookup_cpu`` without gradients, for exported programs.

    That one chooses its ways by the number of images, which a graph does not know, and shrinks by
    ``relu(d) * a / (|d| + 1e-12)``, which is 0 / 0 wherever the 1e-12 is taken for 0, as ONNX's
    optimisers and half precision do. The weights are the same but where d itself is near 1e-12.
    """
    weights = torch.bmm(query.transpose(0, 1), memory.mT)  # [N, B, M]
    if mode == "gumbel":
        weights = torch.softmax(weights, dim=-1)
        threshold = weights.topk(top_k, dim=-1).values[..., -1:]
    if mode != "raw":
        weights = weights * (weights > threshold)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(EPSILON)
    answer = torch.bmm(weights, memory if values is None else values)
    return answer.transpose(0, 1).contiguous(), query.new_empty(0)


DECOMPOSITIONS[torch.ops.squid_fast.memory_lookup.default] = _memory_lookup_in_graphs


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
    and, where it requires them, the memory. The answer is [B, N, C], with ``values`` [B, N, V].

    Args:
        query: [B, N, C], or [B, C] for a single memory. The answer is computed in its dtype.
        memory: [N, M, C], or [M, C].
        values: [N, M, V], what is summed in place of the slots, such as their projections; without
            gradients. [M, V] for a single memory.

    Raises:
        ValueError: shapes do not fit, both kinds of shrinkage are asked for, or one is out of
            range; or a gradient is asked for that ``values`` do not have.

    >>> memory = torch.tensor([[0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    >>> memory_lookup(torch.tensor([[1.0, 0.0]]), memory, top_k=2)  # the best slot alone
    tensor([[0.9000, 0.1000]])
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
