"""Shrinkage of logits [..., M] to weights (paper section 3.2), forward and backward, for any M.

Gumbel    p = softmax(logits)    t = k-th largest p    h = (p - t) p / (p - t + eps) where p > t
          weights = h / max(sum h, eps)                grad_logits = p (grad - sum p grad)
hard      u = logits - threshold    h = u logits / (u + eps) where u > 0, weights as above, all of
          it differentiated
raw       weights = logits

A program owns a few rows and reads them twice, the second time from the cache: once for the sums
and, with Gumbel, the k largest logits; once to write. Only entries of that list exceed the k-th
largest, so the list gives the sum of h as well. What is kept is decided by comparing logits with
the k-th largest, or with the threshold of hard shrinkage, and both times they are the same numbers,
so that the passes agree and ties need no special case. A NaN makes its row's sum NaN, and with it
the whole row.

The memory lookup uses the same kernels, on scores that come in parts to be added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import on_device, power_of_2
from .tiles import (
    EPSILON,
    NEVER,
    add_to_softmax,
    floored,
    insert_best,
    keep_above,
    no_best,
    softmax_above,
)


@triton.jit
def load_rows(parts_ptr, parts, stride_part, offsets, mask, fill):
    """Sum [BLOCK_R, BLOCK_M] of the parts in float32, ``fill`` outside the mask.

    The same bits at every call, in any layout: the parts are added in one order, and between a load
    and an addition there is no product that a compiler might join with it.
    """
    total = tl.load(parts_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for _ in range(1, parts):
        parts_ptr += stride_part
        total += tl.load(parts_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, total, fill)


@triton.jit
def _shrinkage_forward_kernel(
    parts_ptr, parts, weights_ptr, scores_ptr, R, M,
    MODE: tl.constexpr, K: tl.constexpr, K_TILE: tl.constexpr, THRESHOLD: tl.constexpr,
    KEEP_SCORES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Logits, parts [parts, R, M] that add up to them, to weights [R, M].

    Both contiguous, float32, bfloat16 or float16; scores [R, M] float32, the sum of the parts,
    written if KEEP_SCORES.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * M + columns[None, :]  # [BLOCK_R, BLOCK_M]
    stride_part = tl.cast(R, tl.int64) * M

    maximum = tl.full([BLOCK_R], NEVER, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    threshold = tl.full([BLOCK_R], THRESHOLD, tl.float32)
    best, places = no_best(BLOCK_R, K, K_TILE)
    if MODE != "raw":
        for start in range(0, M, BLOCK_M):
            inside = (rows < R)[:, None] & (start + columns < M)[None, :]
            tile = load_rows(parts_ptr, parts, stride_part, offsets + start, inside, NEVER)
            if MODE == "gumbel":
                maximum, total = add_to_softmax(maximum, total, tile)
                best, places = insert_best(best, places, tile, start)
            else:
                total += tl.sum(keep_above(tile, threshold[:, None]), axis=1)
    norm, kth = floored(total), threshold
    if MODE == "gumbel":
        spare = tl.arange(0, K_TILE)[None, :] >= K
        kth = tl.min(best, axis=1)
        threshold = tl.exp(kth - maximum) / total
        p_best = softmax_above(best, kth[:, None], maximum[:, None], total[:, None])
        kept = tl.where(spare, 0.0, keep_above(p_best, threshold[:, None]))  # [BLOCK_R, K_TILE]
        norm = floored(tl.sum(kept, axis=1))

    for start in range(0, M, BLOCK_M):
        inside = (rows < R)[:, None] & (start + columns < M)[None, :]
        tile = load_rows(parts_ptr, parts, stride_part, offsets + start, inside, NEVER)
        if KEEP_SCORES:
            tl.store(scores_ptr + offsets + start, tile, mask=inside)
        if MODE == "gumbel":
            p = softmax_above(tile, kth[:, None], maximum[:, None], total[:, None])
            tile = keep_above(p, threshold[:, None]) / norm[:, None]
        if MODE == "hard":
            tile = keep_above(tile, threshold[:, None]) / norm[:, None]
        tl.store(weights_ptr + offsets + start, tile, mask=inside)


@triton.jit
def _shrinkage_backward_kernel(
    grad_parts_ptr, grad_parts, parts_ptr, parts, grad_logits_ptr, R, M,
    MODE: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits [R, M] from parts of that of the weights [grad_parts, R, M].

    parts [parts, R, M] add up to the logits. All contiguous, each float32, bfloat16 or float16.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * M + columns[None, :]  # [BLOCK_R, BLOCK_M]
    stride_part = tl.cast(R, tl.int64) * M

    maximum = tl.full([BLOCK_R], NEVER, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)  # of exponentials, or of h
    weighted = tl.zeros([BLOCK_R], tl.float32)  # of the same, times grad
    threshold = tl.full([BLOCK_R], THRESHOLD, tl.float32)
    if MODE != "raw":
        for start in range(0, M, BLOCK_M):
            inside = (rows < R)[:, None] & (start + columns < M)[None, :]
            tile = load_rows(parts_ptr, parts, stride_part, offsets + start, inside, NEVER)
            grad = load_rows(grad_parts_ptr, grad_parts, stride_part, offsets + start, inside, 0.0)
            if MODE == "gumbel":
                before = maximum
                maximum, total = add_to_softmax(maximum, total, tile)
                weighted = tl.where(before == NEVER, 0.0, weighted * tl.exp(before - maximum))
                shift = tl.where(maximum == NEVER, 0.0, maximum)
                weighted += tl.sum(tl.exp(tile - shift[:, None]) * grad, axis=1)
            else:
                kept = keep_above(tile, threshold[:, None])
                total += tl.sum(kept, axis=1)
                weighted += tl.sum(kept * grad, axis=1)
    mean = weighted / floored(total)
    through_total = tl.where(total <= EPSILON, 0.0, mean)  # the floor has no gradient

    for start in range(0, M, BLOCK_M):
        inside = (rows < R)[:, None] & (start + columns < M)[None, :]
        grad = load_rows(grad_parts_ptr, grad_parts, stride_part, offsets + start, inside, 0.0)
        if MODE != "raw":
            tile = load_rows(parts_ptr, parts, stride_part, offsets + start, inside, NEVER)
            if MODE == "gumbel":
                p = tl.exp(tile - maximum[:, None]) / total[:, None]
                grad = p * (grad - mean[:, None])
            else:
                u = tile - threshold[:, None]
                slope = (tile + u - keep_above(tile, threshold[:, None])) / (
                    tl.maximum(u, 0.0) + EPSILON
                )
                grad = (grad - through_total[:, None]) / floored(total)[:, None]
                grad = tl.where(u <= 0, 0.0, grad * slope)
        tl.store(grad_logits_ptr + offsets + start, grad, mask=inside)


# --- configuration and launchers ------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Rows and slots of a tile."""

    block_r: int
    block_m: int
    num_warps: int = 4

    @staticmethod
    def choose(num_slots: int) -> Config:
        # 8 numbers a thread: enough loads in flight to cover memory; with 16, the backward of hard
        # shrinkage spills. Rows longer than a tile go through it piece by piece.
        block_m = min(power_of_2(num_slots), 1024)
        return Config(max(1024 // block_m, 1), block_m)


def shrink(
    parts: Tensor,
    mode: str,
    top_k: int,
    threshold: float,
    dtype: torch.dtype,
    scores: Tensor | None = None,
) -> Tensor:
    """Weights [..., M] of logits that are the sum of parts [parts, ..., M].

    Writes the sum to ``scores`` [..., M], float32 and contiguous, if that is given.
    """
    parts, M = parts.contiguous(), parts.shape[-1]
    weights = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    R, config = weights.numel() // M, Config.choose(M)
    with on_device(parts):
        _shrinkage_forward_kernel[(triton.cdiv(R, config.block_r),)](
            parts, len(parts), weights, weights if scores is None else scores, R, M,
            MODE=mode, K=max(top_k, 1), K_TILE=power_of_2(top_k), THRESHOLD=threshold,
            KEEP_SCORES=scores is not None,
            BLOCK_R=config.block_r, BLOCK_M=config.block_m, num_warps=config.num_warps,
        )  # fmt: skip
    return weights


def shrink_backward(
    grad_parts: Tensor, parts: Tensor, mode: str, threshold: float, dtype: torch.dtype
) -> Tensor:
    """Gradient of the logits [..., M]; both arguments are parts [parts, ..., M] to be added."""
    grad_parts, parts, M = grad_parts.contiguous(), parts.contiguous(), parts.shape[-1]
    grad_logits = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    R, config = grad_logits.numel() // M, Config.choose(M)
    with on_device(parts):
        _shrinkage_backward_kernel[(triton.cdiv(R, config.block_r),)](
            grad_parts, len(grad_parts), parts, len(parts), grad_logits, R, M,
            MODE=mode, THRESHOLD=threshold,
            BLOCK_R=config.block_r, BLOCK_M=config.block_m, num_warps=config.num_warps,
        )  # fmt: skip
    return grad_logits


def forward(logits: Tensor, top_k: int) -> Tensor:
    """Gumbel weights [..., M], contiguous, in the dtype of the logits."""
    return shrink(logits[None], "gumbel", top_k, 0.0, logits.dtype)


def backward(grad: Tensor, logits: Tensor) -> Tensor:
    """Gradient of the logits [..., M], contiguous, in their dtype."""
    return shrink_backward(grad[None], logits[None], "gumbel", 0.0, logits.dtype)


def hard_forward(logits: Tensor, threshold: float) -> Tensor:
    """Weights [..., M] of hard shrinkage, contiguous, in the dtype of the logits."""
    return shrink(logits[None], "hard", 0, threshold, logits.dtype)


def hard_backward(grad: Tensor, logits: Tensor, threshold: float) -> Tensor:
    """Gradient of the logits [..., M] of hard shrinkage, contiguous, in their dtype."""
    return shrink_backward(grad[None], logits[None], "hard", threshold, logits.dtype)
