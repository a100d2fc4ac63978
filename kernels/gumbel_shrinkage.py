"""Gumbel shrinkage of logits [..., M] (paper section 3.2), forward and backward, for any M.

    p = softmax(logits)    t = k-th largest p    h = (p - t) p / (p - t + eps) where p > t, else 0
    weights = h / max(sum h, eps)                grad_logits = p (grad - sum p grad)

A program owns a few rows and reads them twice, the second time from the cache: once for the
softmax's maximum and sum and for the k largest logits, once to write. Larger than the k-th largest
are only entries of that list, so it gives the sum of h as well. Ties need no thought: whatever
equals the k-th largest has p - t = 0. A NaN makes its row's sum NaN, and with it the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import on_device, power_of_2
from .tiles import NEVER, add_to_softmax, floored, insert_best, keep_above, no_best

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _gumbel_shrinkage_forward_kernel(
    logits_ptr, weights_ptr, R, M,
    K: tl.constexpr, K_TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """logits, weights: [R, M] contiguous, float32, bfloat16 or float16."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * M + columns[None, :]  # [BLOCK_R, BLOCK_M]

    maximum = tl.full([BLOCK_R], NEVER, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    best, places = no_best(BLOCK_R, K, K_TILE)
    for start in range(0, M, BLOCK_M):
        inside = (rows < R)[:, None] & (start + columns < M)[None, :]
        tile = tl.load(logits_ptr + offsets + start, mask=inside, other=NEVER).to(tl.float32)
        maximum, total = add_to_softmax(maximum, total, tile)
        best, places = insert_best(best, places, tile, start)

    spare = tl.arange(0, K_TILE)[None, :] >= K
    p_best = tl.exp(best - maximum[:, None]) / total[:, None]  # [BLOCK_R, K_TILE]
    threshold = tl.min(p_best, axis=1)
    norm = floored(tl.sum(tl.where(spare, 0.0, keep_above(p_best, threshold)), axis=1))
    for start in range(0, M, BLOCK_M):
        inside = (rows < R)[:, None] & (start + columns < M)[None, :]
        tile = tl.load(logits_ptr + offsets + start, mask=inside, other=NEVER).to(tl.float32)
        p = tl.exp(tile - maximum[:, None]) / total[:, None]
        weights = keep_above(p, threshold) / norm[:, None]
        tl.store(weights_ptr + offsets + start, weights, mask=inside)


@triton.jit
def _gumbel_shrinkage_backward_kernel(
    grad_ptr, logits_ptr, grad_logits_ptr, R, M, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr
):
    """All three [R, M] contiguous, each float32, bfloat16 or float16."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * M + columns[None, :]  # [BLOCK_R, BLOCK_M]

    maximum = tl.full([BLOCK_R], NEVER, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    weighted = tl.zeros([BLOCK_R], tl.float32)  # sum of exponential times grad
    for start in range(0, M, BLOCK_M):
        inside = (rows < R)[:, None] & (start + columns < M)[None, :]
        tile = tl.load(logits_ptr + offsets + start, mask=inside, other=NEVER).to(tl.float32)
        grad = tl.load(grad_ptr + offsets + start, mask=inside, other=0.0).to(tl.float32)
        before = maximum
        maximum, total = add_to_softmax(maximum, total, tile)
        shift = tl.where(maximum == NEVER, 0.0, maximum)
        weighted = tl.where(before == NEVER, 0.0, weighted * tl.exp(before - maximum))
        weighted += tl.sum(tl.exp(tile - shift[:, None]) * grad, axis=1)

    mean = weighted / total  # sum of p times grad
    for start in range(0, M, BLOCK_M):
        inside = (rows < R)[:, None] & (start + columns < M)[None, :]
        tile = tl.load(logits_ptr + offsets + start, mask=inside, other=NEVER).to(tl.float32)
        grad = tl.load(grad_ptr + offsets + start, mask=inside, other=0.0).to(tl.float32)
        p = tl.exp(tile - maximum[:, None]) / total[:, None]
        tl.store(grad_logits_ptr + offsets + start, p * (grad - mean[:, None]), mask=inside)


# --- configuration and launchers ------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Rows and slots of a tile."""

    block_r: int
    block_m: int
    num_warps: int = 4

    @staticmethod
    def choose(num_slots: int) -> Config:
        # 16 numbers a thread: enough loads in flight to cover memory, and room for the k best.
        # Rows longer than a tile go through it piece by piece.
        block_m = min(power_of_2(num_slots), 2048)
        return Config(max(2048 // block_m, 1), block_m)


def forward(logits: Tensor, top_k: int, dtype: torch.dtype | None = None) -> Tensor:
    """Weights [..., M], contiguous, in ``dtype`` or that of the logits."""
    M = logits.shape[-1]
    rows = logits.contiguous().view(-1, M)
    weights = torch.empty_like(rows, dtype=dtype)
    config = Config.choose(M)
    with on_device(rows):
        _gumbel_shrinkage_forward_kernel[(triton.cdiv(len(rows), config.block_r),)](
            rows,
            weights,
            len(rows),
            M,
            K=top_k,
            K_TILE=power_of_2(top_k),
            BLOCK_R=config.block_r,
            BLOCK_M=config.block_m,
            num_warps=config.num_warps,
        )
    return weights.view(logits.shape)


def backward(grad: Tensor, logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Gradient of the logits [..., M], contiguous, in ``dtype`` or that of the logits."""
    M = logits.shape[-1]
    rows, grad_rows = logits.contiguous().view(-1, M), grad.contiguous().view(-1, M)
    grad_logits = torch.empty_like(rows, dtype=dtype)
    config = Config.choose(M)
    with on_device(rows):
        _gumbel_shrinkage_backward_kernel[(triton.cdiv(len(rows), config.block_r),)](
            grad_rows,
            rows,
            grad_logits,
            len(rows),
            M,
            BLOCK_R=config.block_r,
            BLOCK_M=config.block_m,
            num_warps=config.num_warps,
        )
    return grad_logits.view(logits.shape)
