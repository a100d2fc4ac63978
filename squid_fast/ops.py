"""The five operations of SQUID as PyTorch custom operators.

Each public function checks its arguments and calls an operator ``torch.ops.squid_fast.<name>``
that has a fake implementation (so that ``torch.compile`` and export see through it), a gradient
whose backward is an operator too, and one implementation in vectorised PyTorch that serves every
device. Nothing synchronises with the host. Results are contiguous, but for those of the masked
shortcut, which keep their layout. NaN stays within its row. Double backward is not supported.

Symbols: B images, N patches of an image, M memory slots, C slot width, k = ``top_k``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-12  # floor of the published normalisations

_GUMBEL, _HARD, _RAW = "gumbel", "hard", "raw"


# --- shrinkage: values and gradients, shared by the stand-alone operators and the lookup ---------


def _keep_above(values: Tensor, threshold: Tensor | float) -> Tensor:
    distance = values - threshold
    kept = distance.relu() * values / (distance.abs() + EPSILON)
    return kept / kept.sum(dim=-1, keepdim=True).clamp_min(EPSILON)


def _gumbel_weights(probabilities: Tensor, top_k: int) -> Tensor:
    threshold = probabilities.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return _keep_above(probabilities, threshold)


def _softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    weighted = grad * probabilities
    return weighted - probabilities * weighted.sum(dim=-1, keepdim=True)


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


def _wide(x: Tensor) -> Tensor:
    """At least float32: selection and normalisation never happen in half precision."""
    return x if x.dtype == torch.float64 else x.float()


# --- gumbel and hard shrinkage --------------------------------------------------------------------


@torch.library.custom_op("squid_fast::gumbel_shrinkage", mutates_args=())
def _gumbel_shrinkage(logits: Tensor, top_k: int) -> Tensor:
    weights = _gumbel_weights(torch.softmax(_wide(logits), dim=-1), top_k)
    return weights.to(logits.dtype).contiguous()


@torch.library.custom_op("squid_fast::gumbel_shrinkage_backward", mutates_args=())
def _gumbel_shrinkage_backward(grad: Tensor, logits: Tensor) -> Tensor:
    probabilities = torch.softmax(_wide(logits), dim=-1)
    return _softmax_backward(_wide(grad), probabilities).to(logits.dtype).contiguous()


@torch.library.custom_op("squid_fast::hard_shrinkage", mutates_args=())
def _hard_shrinkage(logits: Tensor, threshold: float) -> Tensor:
    return _keep_above(_wide(logits), threshold).to(logits.dtype).contiguous()


@torch.library.custom_op("squid_fast::hard_shrinkage_backward", mutates_args=())
def _hard_shrinkage_backward(grad: Tensor, logits: Tensor, threshold: float) -> Tensor:
    return _hard_backward(_wide(grad), _wide(logits), threshold).to(logits.dtype).contiguous()


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


def _lookup_weights(logits: Tensor, mode: str, top_k: int, threshold: float) -> Tensor:
    if mode == _GUMBEL:
        return _gumbel_weights(torch.softmax(logits, dim=-1), top_k)
    if mode == _HARD:
        return _keep_above(logits, threshold)
    return logits


@torch.library.custom_op("squid_fast::memory_lookup", mutates_args=())
def _memory_lookup(
    query: Tensor, memory: Tensor, mode: str, top_k: int, threshold: float
) -> Tensor:
    q = query.transpose(0, 1)  # [N, B, C]
    logits = _wide(torch.bmm(q, memory.transpose(1, 2)))
    weights = _lookup_weights(logits, mode, top_k, threshold).to(memory.dtype)
    return torch.bmm(weights, memory).transpose(0, 1).contiguous()


@torch.library.custom_op("squid_fast::memory_lookup_backward", mutates_args=())
def _memory_lookup_backward(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    mode: str,
    top_k: int,
    threshold: float,
    memory_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and memory; the latter is empty unless ``memory_grad``.

    The scores are computed again rather than kept: they are the cheap half of the work.
    """
    q, g = query.transpose(0, 1), grad.transpose(0, 1)  # [N, B, C]
    logits = _wide(torch.bmm(q, memory.transpose(1, 2)))
    grad_weights = _wide(torch.bmm(g, memory.transpose(1, 2)))
    probabilities = torch.softmax(logits, dim=-1) if mode == _GUMBEL else logits
    if mode == _GUMBEL:
        grad_logits = _softmax_backward(grad_weights, probabilities)
    elif mode == _HARD:
        grad_logits = _hard_backward(grad_weights, logits, threshold)
    else:
        grad_logits = grad_weights
    grad_logits = grad_logits.to(memory.dtype)
    grad_query = torch.bmm(grad_logits, memory).transpose(0, 1).contiguous()
    if not memory_grad:
        return grad_query, memory.new_empty(0)
    if mode == _GUMBEL:
        weights = _gumbel_weights(probabilities, top_k)
    else:
        weights = _lookup_weights(logits, mode, top_k, threshold)
    weights = weights.to(memory.dtype)
    grad_memory = torch.bmm(weights.transpose(1, 2), g)
    grad_memory = grad_memory.baddbmm_(grad_logits.transpose(1, 2), q)
    return grad_query, grad_memory


@_memory_lookup.register_fake
def _(query: Tensor, memory: Tensor, mode: str, top_k: int, threshold: float) -> Tensor:
    return query.new_empty(query.shape)


@_memory_lookup_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    mode: str,
    top_k: int,
    threshold: float,
    memory_grad: bool,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), memory.new_empty(memory.shape if memory_grad else (0,))


def _save_lookup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, memory, *ctx.parameters = inputs
    ctx.save_for_backward(query, memory)


def _lookup_gradients(ctx, grad):  # type: ignore[no-untyped-def]
    query, memory = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    grad_query, grad_memory = _memory_lookup_backward(grad, query, memory, *ctx.parameters, wanted)
    return grad_query, grad_memory if wanted else None, None, None, None


_memory_lookup.register_autograd(_lookup_gradients, setup_context=_save_lookup)


def memory_lookup(
    query: Tensor,
    memory: Tensor,
    top_k: int | None = None,
    *,
    threshold: float | None = None,
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

    Returns:
        Looked-up features in the shape and dtype of ``query``.

    Raises:
        ValueError: shapes do not fit, both kinds of shrinkage are asked for, or one is out of
            range.
    """
    if query.dim() == 2 and memory.dim() == 2:
        return memory_lookup(query[:, None], memory[None], top_k, threshold=threshold)[:, 0]
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
    mode = _GUMBEL if top_k is not None else _HARD if threshold is not None else _RAW
    return _memory_lookup(
        query, memory.to(query.dtype), mode, top_k or 0, 0.0 if threshold is None else threshold
    )


# --- masked shortcut ------------------------------------------------------------------------------

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _philox_uniform(seed: Tensor, count: int) -> Tensor:
    """Uniform float32 [count] in [0, 1): Philox 4x32-10 of the counters 0 .. count-1.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". 32-bit words are held in
    int64, whose multiplication wraps, so that it runs on every device. The numbers are those of
    Triton's ``tl.rand(seed, offset)``.
    """
    c0 = torch.arange(count, device=seed.device, dtype=torch.int64)
    c1 = torch.zeros_like(c0)
    c2, c3 = c1, c1
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        low, high = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c2 = ((high >> 32) & _LOW) ^ c1 ^ k0, ((low >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = high & _LOW, low & _LOW
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _LOW, (k1 + _PHILOX_WEYL[1]) & _LOW
    # As a signed word folded at zero: 31 random bits, scaled so that 1 is never reached.
    return torch.where(c0 >= 2**31, _LOW - c0, c0).float() * 4.6566127342e-10


def shortcut_mask(seed: Tensor, shape: tuple[int, ...], keep_probability: float) -> Tensor:
    """The draw of ``masked_shortcut``: bool [B, 1, H, W] for maps of ``shape`` [B, C, H, W]."""
    B, _, H, W = shape
    return (_philox_uniform(seed, B * H * W) < keep_probability).view(B, 1, H, W)


@torch.library.custom_op("squid_fast::masked_shortcut", mutates_args=())
def _masked_shortcut(
    inpainted: Tensor, shortcut: Tensor, keep_probability: float, seed: Tensor
) -> Tensor:
    return torch.where(shortcut_mask(seed, inpainted.shape, keep_probability), inpainted, shortcut)


@torch.library.custom_op("squid_fast::masked_shortcut_backward", mutates_args=())
def _masked_shortcut_backward(
    grad: Tensor, keep_probability: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    mask = shortcut_mask(seed, grad.shape, keep_probability)
    return torch.where(mask, grad, 0), torch.where(mask, 0, grad)


@_masked_shortcut.register_fake
def _(inpainted: Tensor, shortcut: Tensor, keep_probability: float, seed: Tensor) -> Tensor:
    return torch.where(inpainted[:, :1].bool(), inpainted, shortcut)


@_masked_shortcut_backward.register_fake
def _(grad: Tensor, keep_probability: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    mask = grad[:, :1].bool()
    return torch.where(mask, grad, 0), torch.where(mask, 0, grad)


def _save_draw(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.keep_probability = inputs[2]
    ctx.save_for_backward(inputs[3])


_masked_shortcut.register_autograd(
    lambda ctx, grad: (
        *_masked_shortcut_backward(grad, ctx.keep_probability, *ctx.saved_tensors),
        None,
        None,
    ),
    setup_context=_save_draw,
)


def masked_shortcut(
    inpainted: Tensor, shortcut: Tensor, keep_probability: float, seed: Tensor | None = None
) -> Tensor:
    """``mask * inpainted + (1 - mask) * shortcut``, one Bernoulli draw per (image, row, column).

    Paper section 3.3. The draw is shared by the channels and is a function of
    ``seed`` alone: the same on every device, made again in the backward, never stored.

    Args:
        inpainted, shortcut: [B, C, H, W], same shape, dtype and device.
        keep_probability: chance of ``inpainted``, 0 to 1.
        seed: int64 [] on the same device; drawn from PyTorch's generator unless given.

    Raises:
        ValueError: shapes or dtypes differ, or the probability is outside [0, 1].
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
    return _masked_shortcut(inpainted, shortcut, float(keep_probability), seed)


# --- neighbourhood attention ----------------------------------------------------------------------


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
    scores = _wide(q @ key.transpose(-2, -1)) / math.sqrt(d)
    return q, torch.softmax(scores + _neighbour_bias(math.isqrt(N), scores), dim=-1)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2).contiguous()


@torch.library.custom_op("squid_fast::neighbourhood_attention", mutates_args=())
def _neighbourhood_attention(
    query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor, num_heads: int
) -> Tensor:
    _, weights = _attention_weights(query, _with_pad(key, pad_key, num_heads), num_heads)
    return _merge_heads(weights.to(value.dtype) @ _with_pad(value, pad_value, num_heads))


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
    B, N, C = query.shape
    k, v = _with_pad(key, pad_key, num_heads), _with_pad(value, pad_value, num_heads)
    q, weights = _attention_weights(query, k, num_heads)
    g = grad.reshape(B, N, num_heads, C // num_heads).transpose(1, 2)
    grad_v = _merge_heads(weights.to(g.dtype).transpose(-2, -1) @ g)
    grad_scores = _softmax_backward(_wide(g @ v.transpose(-2, -1)), weights)
    grad_scores = (grad_scores / math.sqrt(C // num_heads)).to(q.dtype)
    grad_q = _merge_heads(grad_scores @ k)
    grad_k = _merge_heads(grad_scores.transpose(-2, -1) @ q)
    return (
        grad_q,
        grad_k[:, :N].contiguous(),
        grad_v[:, :N].contiguous(),
        grad_k[:, N].sum(dim=0),
        grad_v[:, N].sum(dim=0),
    )


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
