"""The five operations of SQUID as PyTorch custom operators.

Each public function checks its arguments and calls an operator ``torch.ops.squid_fast.<name>``
that has a fake implementation (so that ``torch.compile`` and export see through it) and a gradient
whose backward is an operator too. An operator runs the Triton kernel of its name where
``kernels.choice`` says that it serves, else the vectorised PyTorch of the same name. Nothing
synchronises with the host. Results are contiguous, but for those of the masked shortcut, which keep
their layout. NaN stays within its row. Double backward is not supported.

Symbols: B images, N patches of an image, M memory slots, C slot width, k = ``top_k``.
"""

from __future__ import annotations

import math
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from . import vectorised
from .kernels import choice


def _kernels(operation: str) -> ModuleType:
    """The launchers of an operation, imported (and Triton with them) when they are first needed."""
    return import_module(f".kernels.{operation}", __package__)


# --- gumbel and hard shrinkage --------------------------------------------------------------------


@torch.library.custom_op("squid_fast::gumbel_shrinkage", mutates_args=())
def _gumbel_shrinkage(logits: Tensor, top_k: int) -> Tensor:
    if choice.serves_gumbel_shrinkage(logits, top_k):
        return _kernels("gumbel_shrinkage").forward(logits, top_k)
    return vectorised.gumbel_shrinkage(logits, top_k)


@torch.library.custom_op("squid_fast::gumbel_shrinkage_backward", mutates_args=())
def _gumbel_shrinkage_backward(grad: Tensor, logits: Tensor) -> Tensor:
    if choice.serves_gumbel_shrinkage(logits):
        return _kernels("gumbel_shrinkage").backward(grad, logits)
    return vectorised.gumbel_shrinkage_backward(grad, logits)


@torch.library.custom_op("squid_fast::hard_shrinkage", mutates_args=())
def _hard_shrinkage(logits: Tensor, threshold: float) -> Tensor:
    if choice.serves_hard_shrinkage(logits):
        return _kernels("gumbel_shrinkage").hard_forward(logits, threshold)
    return vectorised.hard_shrinkage(logits, threshold)


@torch.library.custom_op("squid_fast::hard_shrinkage_backward", mutates_args=())
def _hard_shrinkage_backward(grad: Tensor, logits: Tensor, threshold: float) -> Tensor:
    if choice.serves_hard_shrinkage(logits):
        return _kernels("gumbel_shrinkage").hard_backward(grad, logits, threshold)
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
    _check_floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits is a scalar; it needs a last dimension of M slots.")
    _check_top_k(top_k, logits.shape[-1])
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
    _check_floating("logits", logits)
    _check_threshold(threshold)
    return _hard_shrinkage(logits, float(threshold))


# --- memory lookup --------------------------------------------------------------------------------


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
        return _kernels("memory_lookup").forward(*arguments)
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
        return _kernels("memory_lookup").backward(*arguments)
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
            f"query is {_shape(query)} and memory {_shape(memory)}; they must be [B, N, C] and "
            "[N, M, C], or [B, C] and [M, C]."
        )
    if query.shape[1] != memory.shape[0] or query.shape[2] != memory.shape[2]:
        raise ValueError(
            f"query is {_shape(query)} and memory {_shape(memory)}; a query [B, {memory.shape[0]}, "
            f"{memory.shape[2]}] would fit this memory."
        )
    _check_floating("query", query)
    if top_k is not None and threshold is not None:
        raise ValueError(f"top_k={top_k} and threshold={threshold} are both given; give one.")
    if top_k is not None:
        _check_top_k(top_k, memory.shape[1])
    if threshold is not None:
        _check_threshold(threshold)
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
        raise ValueError(f"values is {_shape(values)}; [{N}, {M}, V] would fit this memory.")
    if trained or (torch.is_grad_enabled() and values.requires_grad):
        raise ValueError(
            "values are given while query, memory or values require a gradient, which such a "
            "lookup does not have; call it under torch.no_grad()."
        )
    return values


# --- masked shortcut ------------------------------------------------------------------------------


@torch.library.custom_op("squid_fast::masked_shortcut", mutates_args=())
def _masked_shortcut(
    inpainted: Tensor,
    shortcut: Tensor,
    keep_probability: float,
    seed: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    arguments = (inpainted, shortcut, keep_probability, seed, scale, shift)
    if choice.serves_masked_shortcut(inpainted):
        return _kernels("masked_shortcut").forward(*arguments)
    return vectorised.masked_shortcut(*arguments)


@torch.library.custom_op("squid_fast::masked_shortcut_backward", mutates_args=())
def _masked_shortcut_backward(
    grad: Tensor,
    inpainted: Tensor | None,
    keep_probability: float,
    seed: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inpainted, shortcut, scale and shift; the last two empty without an affine."""
    arguments = (grad, inpainted, keep_probability, seed, scale, shift)
    if choice.serves_masked_shortcut(grad):
        return _kernels("masked_shortcut").backward(*arguments)
    return vectorised.masked_shortcut_backward(*arguments)


@_masked_shortcut.register_fake
def _(
    inpainted: Tensor,
    shortcut: Tensor,
    keep_probability: float,
    seed: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    return torch.where(inpainted[:, :1].bool(), inpainted, shortcut)


@_masked_shortcut_backward.register_fake
def _(
    grad: Tensor,
    inpainted: Tensor | None,
    keep_probability: float,
    seed: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = grad[:, :1].bool()
    kept, passed = torch.where(mask, grad, 0), torch.where(mask, 0, grad)
    if scale is None or shift is None:
        return kept, passed, grad.new_empty(0), grad.new_empty(0)
    return kept, passed, torch.empty_like(scale), torch.empty_like(shift)


def _save_draw(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    inpainted, _, ctx.keep_probability, seed, scale, shift = inputs
    # Without an affine the gradient needs nothing of the maps.
    ctx.save_for_backward(None if scale is None else inpainted, seed, scale, shift)


def _shortcut_gradients(ctx, grad):  # type: ignore[no-untyped-def]
    inpainted, seed, scale, shift = ctx.saved_tensors
    kept, passed, grad_scale, grad_shift = _masked_shortcut_backward(
        grad, inpainted, ctx.keep_probability, seed, scale, shift
    )
    if scale is None:
        grad_scale = grad_shift = None
    return kept, passed, None, None, grad_scale, grad_shift


_masked_shortcut.register_autograd(_shortcut_gradients, setup_context=_save_draw)


def masked_shortcut(
    inpainted: Tensor,
    shortcut: Tensor,
    keep_probability: float,
    seed: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``mask * inpainted + (1 - mask) * shortcut``, one Bernoulli draw per (image, row, column).

    Paper section 3.3. The draw is shared by the channels and is a function of ``seed`` alone: the
    same on every device, made again in the backward, never stored. With ``scale`` and ``shift``,
    ``relu(scale * inpainted + shift)`` takes the place of ``inpainted`` in the same pass: a batch
    norm of known statistics and the activation behind it.

    Args:
        inpainted, shortcut: [B, C, H, W], same shape, dtype and device.
        keep_probability: chance of ``inpainted``, 0 to 1.
        seed: int64 [] on the same device; drawn from PyTorch's generator unless given.
        scale, shift: [C] each, or neither; computed with in float32.

    Raises:
        ValueError: shapes or dtypes differ, the probability is outside [0, 1], or only one of
            ``scale`` and ``shift`` is given.
    """
    if inpainted.dim() != 4 or inpainted.shape != shortcut.shape:
        raise ValueError(
            f"inpainted is {_shape(inpainted)} and shortcut {_shape(shortcut)}; both must be the "
            "same [B, C, H, W]."
        )
    if inpainted.dtype != shortcut.dtype:
        raise ValueError(
            f"inpainted is {inpainted.dtype} and shortcut {shortcut.dtype}; they must agree."
        )
    if not 0.0 <= keep_probability <= 1.0:
        raise ValueError(f"keep_probability is {keep_probability}; it must lie in [0, 1].")
    if seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=inpainted.device)
    if scale is not None or shift is not None:
        scale, shift = _affine_parameters(inpainted, scale, shift)
    return _masked_shortcut(inpainted, shortcut, float(keep_probability), seed, scale, shift)


def _affine_parameters(
    inpainted: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    C = inpainted.shape[1]
    if scale is None or shift is None:
        given, absent = ("shift", "scale") if scale is None else ("scale", "shift")
        raise ValueError(f"{given} is given without {absent}; an affine needs both, [{C}] each.")
    if scale.shape != (C,) or shift.shape != (C,):
        raise ValueError(f"scale is {_shape(scale)} and shift {_shape(shift)}; both must be [{C}].")
    dtype = torch.float64 if inpainted.dtype == torch.float64 else torch.float32
    return scale.to(dtype), shift.to(dtype)


# --- neighbourhood attention ----------------------------------------------------------------------


@torch.library.custom_op("squid_fast::neighbourhood_attention", mutates_args=())
def _neighbourhood_attention(
    query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor, num_heads: int
) -> Tensor:
    arguments = (query, key, value, pad_key, pad_value, num_heads)
    if choice.serves_neighbourhood_attention(query):
        return _kernels("neighbourhood_attention").forward(*arguments)
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
        return _kernels("neighbourhood_attention").backward(*arguments)
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
    return tuple(x.new_empty(x.shape) for x in (query, key, value, pad_key, pad_value))  # type: ignore[return-value]


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
            f"query is {_shape(query)}, key {_shape(key)} and value {_shape(value)}; all three "
            "must be the same [B, N, C]."
        )
    N, C = query.shape[1:]
    if math.isqrt(N) ** 2 != N or N == 0:
        raise ValueError(f"N is {N}; a square grid of patches has 1, 4, 9, 16, ... of them.")
    if num_heads < 1 or C % num_heads:
        raise ValueError(f"C is {C} and num_heads {num_heads}; the heads must divide C.")
    if pad_key.shape != (C,) or pad_value.shape != (C,):
        raise ValueError(
            f"pad_key is {_shape(pad_key)} and pad_value {_shape(pad_value)}; both must be [{C}]."
        )
    dtype = query.dtype
    return _neighbourhood_attention(
        query, key.to(dtype), value.to(dtype), pad_key.to(dtype), pad_value.to(dtype), num_heads
    )


# --- checks ---------------------------------------------------------------------------------------


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in x.shape) + "]"


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; a floating-point dtype is needed.")


def _check_top_k(top_k: int, num_slots: int) -> None:
    if not 1 <= top_k <= num_slots:
        raise ValueError(
            f"top_k is {top_k}, but there are {num_slots} memory slots; it must lie between 1 and "
            f"{num_slots}."
        )


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold is {threshold}; it must be positive and finite.")
