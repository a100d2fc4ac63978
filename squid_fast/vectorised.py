"""The five operations in vectorised PyTorch: what runs where no kernel serves.

That is every CPU, float64, and the shapes for which ``kernels.choice`` gives its reasons. Arguments
have been checked by ``ops``. NaN stays within its row.

Symbols: B images, N patches of an image, M memory slots, C slot width, k = ``top_k``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12  # floor of the published normalisations


def wide(x: Tensor) -> Tensor:
    """At least float32: selection and normalisation never happen in half precision."""
    return x if x.dtype == torch.float64 else x.float()


# --- shrinkage ------------------------------------------------------------------------------------


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


def _softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


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


def gumbel_shrinkage(logits: Tensor, top_k: int) -> Tensor:
    weights = _gumbel_weights(torch.softmax(wide(logits), dim=-1), top_k)
    return weights.to(logits.dtype).contiguous()


def gumbel_shrinkage_backward(grad: Tensor, logits: Tensor) -> Tensor:
    probabilities = torch.softmax(wide(logits), dim=-1)
    return _softmax_backward(wide(grad), probabilities).to(logits.dtype).contiguous()


def hard_shrinkage(logits: Tensor, threshold: float) -> Tensor:
    return _keep_above(wide(logits), threshold).to(logits.dtype).contiguous()


def hard_shrinkage_backward(grad: Tensor, logits: Tensor, threshold: float) -> Tensor:
    return _hard_backward(wide(grad), wide(logits), threshold).to(logits.dtype).contiguous()


# --- memory lookup --------------------------------------------------------------------------------


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


def memory_lookup(
    query: Tensor,
    memory: Tensor,
    values: Tensor | None,
    mode: str,
    top_k: int,
    threshold: float,
    keep_scores: bool,
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, memory)
    values = memory if values is None else values
    kept_scores = scores if keep_scores else query.new_empty(0, dtype=torch.float32)
    if mode == "gumbel":
        weights, slots = _largest(torch.softmax(scores, dim=-1), top_k)
        return _gather(slots, weights, values), kept_scores
    weights = _keep_above(scores, threshold) if mode == "hard" else scores
    return _combine(weights.to(values.dtype), values), kept_scores


def memory_lookup_backward(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    scores: Tensor,
    mode: str,
    top_k: int,
    threshold: float,
    memory_grad: bool,
) -> tuple[Tensor, Tensor]:
    logits = scores if scores.numel() else _scores(query, memory)
    probabilities = torch.softmax(logits, dim=-1) if mode == "gumbel" else logits
    grad_logits = _scores(grad, memory)
    if mode == "gumbel":
        grad_logits = _softmax_backward(grad_logits, probabilities)
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


# --- masked shortcut ------------------------------------------------------------------------------

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox_uniform(seed: Tensor, count: int) -> Tensor:
    """Uniform float32 [count] in [0, 1): Philox 4x32-10 of the counters 0 .. count-1.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". 32-bit words are held in
    int64, whose multiplication wraps, so that it runs on every device. The numbers are those of
    Triton's ``tl.rand(seed, offset)``.
    """

    def column(*words: int) -> Tensor:
        # Written on the device: a copy from the host would not be captured in a CUDA graph.
        return torch.stack([torch.full((1,), word, device=seed.device) for word in words])

    rounds = torch.arange(10, device=seed.device)[:, None, None]
    keys = (torch.stack([seed, seed >> 32]).view(2, 1) + rounds * column(*_PHILOX_WEYL)) & _LOW
    multipliers = column(*_PHILOX_MULTIPLIERS)
    # Words 0 and 2 of the four, then 1 and 3; the counter is word 0.
    even = torch.arange(count, device=seed.device) * column(1, 0)
    odd = torch.zeros_like(even)
    for key in keys:
        product = (even * multipliers).flip(0)
        even, odd = ((product >> 32) & _LOW) ^ odd ^ key, product & _LOW
    word = even[0]
    # As a signed word folded at zero: 31 random bits, scaled so that 1 is never reached.
    return torch.where(word >= 2**31, _LOW - word, word).float() * 4.6566127342e-10


def shortcut_mask(seed: Tensor, shape: tuple[int, ...], keep_probability: float) -> Tensor:
    """The draw of ``masked_shortcut``: bool [B, 1, H, W] for maps of ``shape`` [B, C, H, W]."""
    B, _, H, W = shape
    return (philox_uniform(seed, B * H * W) < keep_probability).view(B, 1, H, W)


def _zero_unless(mask: Tensor, x: Tensor) -> Tensor:
    """``torch.where(mask, x, 0)`` by its bits, which is faster where the mask is broadcast."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (-mask.to(bits) & x.view(bits)).view(x.dtype)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return wide(x) * scale[:, None, None] + shift[:, None, None]


def masked_shortcut(
    inpainted: Tensor,
    shortcut: Tensor,
    keep_probability: float,
    seed: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    if scale is not None and shift is not None:
        inpainted = _affine(inpainted, scale, shift).relu().to(shortcut.dtype)
    return torch.where(shortcut_mask(seed, inpainted.shape, keep_probability), inpainted, shortcut)


def masked_shortcut_backward(
    grad: Tensor,
    inpainted: Tensor | None,
    keep_probability: float,
    seed: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = shortcut_mask(seed, grad.shape, keep_probability)
    kept, passed = _zero_unless(mask, grad), _zero_unless(~mask, grad)
    if inpainted is None or scale is None or shift is None:
        return kept, passed, grad.new_empty(0), grad.new_empty(0)
    active = wide(kept) * (_affine(inpainted, scale, shift) > 0)
    # What is not active may hold NaN, which times zero would stay.
    grad_scale = torch.where(active != 0, active * inpainted, 0).sum(dim=(0, 2, 3))
    grad_inpainted = (active * scale[:, None, None]).to(grad.dtype)
    return grad_inpainted, passed, grad_scale, active.sum(dim=(0, 2, 3))


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
    scores = wide(q @ key.transpose(-2, -1)) / math.sqrt(d)
    return q, torch.softmax(scores + _neighbour_bias(math.isqrt(N), scores), dim=-1)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2).contiguous()


def neighbourhood_attention(
    query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor, num_heads: int
) -> Tensor:
    _, weights = _attention_weights(query, _with_pad(key, pad_key, num_heads), num_heads)
    return _merge_heads(weights.to(value.dtype) @ _with_pad(value, pad_value, num_heads))


def neighbourhood_attention_backward(
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
    grad_scores = _softmax_backward(wide(g @ v.transpose(-2, -1)), weights)
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
