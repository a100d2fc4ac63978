"""Space-aware memory lookup (paper section 3.2), forward and backward.

    S = query . memory^T    W = shrink(S)    answer = W . memory               (at each place n)
    dW = grad . memory^T    dS = shrink'(dW, S)    grad_query = dS . memory
                            grad_memory = W^T . grad + dS^T . query

Three ways forward, by the number of slots and of rows:

one pass    Up to 256 slots and rows enough to fill the card: a program computes the scores of a row
            block into registers, shrinks them there and multiplies the weights with the memory.
in steps    Few rows, which alone would leave most multiprocessors idle: scores in parts, which the
            next kernel adds up; then the few slots kept, see ``kept_slots``, or else shrinkage and
            a product. What is written in between is small enough to be read from the cache again.
            This is also the way of calls that keep their scores for a backward, which writes them
            anyway; of the backward, since two row blocks of scores do not fit into registers; of
            float32, which takes three pieces there; and of hard shrinkage and raw scores, as one
            pass of the former spills.
search      Many slots: see ``memory_search``.

Sums are taken in one order, whatever the timing: the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import memory_search
from .card import Card, card_of, on_device, power_of_2
from .dispatch import LARGEST_SCORED
from .gumbel_shrinkage import shrink, shrink_backward
from .kept_slots import FEW, answer_from_kept
from .matrix_product import multiply, multiply_in_parts
from .tiles import NEVER, floored, keep_above, kth_largest, multiply_tile, softmax_above


@triton.jit
def _memory_lookup_forward_kernel(
    query_ptr, query_stride_b, query_stride_n, query_stride_c,
    memory_ptr, memory_stride_n, memory_stride_m, memory_stride_c,
    values_ptr, values_stride_n, values_stride_m, values_stride_v, answer_ptr, B, N, M, C, V,
    K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of rows against all slots of its place, Gumbel shrinkage. Grid: (row blocks, N).

    query [B, N, C], memory [N, M, C] and values [N, M, V], what is summed, bfloat16 or float16;
    answer [B, N, V] contiguous, of the same dtype.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1).to(tl.int64)
    slots = tl.arange(0, BLOCK_M)
    scores = multiply_tile(
        tl.zeros([BLOCK_B, BLOCK_M], tl.float32),
        query_ptr + n * query_stride_n, query_stride_b, query_stride_c,
        memory_ptr + n * memory_stride_n, memory_stride_c, memory_stride_m,
        rows, slots.to(tl.int64), B, M, C, 0, tl.cdiv(C, BLOCK_C), BLOCK_C, "ieee",
    )  # fmt: skip
    scores = tl.where((slots < M)[None, :], scores, NEVER)
    kth, maximum = kth_largest(scores, K), tl.max(scores, axis=1)
    total = tl.sum(tl.exp(scores - maximum[:, None]), axis=1)
    p = softmax_above(scores, kth[:, None], maximum[:, None], total[:, None])
    kept = keep_above(p, (tl.exp(kth - maximum) / total)[:, None])
    weights = kept / floored(tl.sum(kept, axis=1))[:, None]
    weights = weights.to(values_ptr.dtype.element_ty)

    value_ptrs = values_ptr + n * values_stride_n + slots.to(tl.int64)[:, None] * values_stride_m
    answer_ptrs = answer_ptr + (rows * N + n)[:, None] * V
    for start in range(0, V, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C).to(tl.int64)
        value_mask = (slots < M)[:, None] & (columns < V)[None, :]
        value = tl.load(value_ptrs + columns[None, :] * values_stride_v, mask=value_mask, other=0.0)
        answer = tl.dot(weights, value)  # [BLOCK_B, BLOCK_C]
        answer_mask = (rows < B)[:, None] & (columns < V)[None, :]
        tl.store(answer_ptrs + columns[None, :], answer, mask=answer_mask)


# --- configuration and launchers ------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile of the one-pass kernel."""

    block_b: int
    block_m: int
    block_c: int
    num_warps: int
    num_stages: int

    @staticmethod
    def choose(B: int, N: int, M: int, C: int, element_size: int, card: Card) -> Config | None:
        """The tile, or None where the other ways are better."""
        # 64 rows, what a warpgroup's instructions take at least, by 256 slots are 64 registers of a
        # thread's 255 with 8 warps. More slots, more rows or 4 warps spill; fewer rows would read
        # the memory more often than the parts of the other way are read.
        block_b, block_m = 64, max(power_of_2(M), 16)
        row_blocks = triton.cdiv(B, block_b) * N
        if M > 256 or element_size == 4 or row_blocks < card.multiprocessors * 3 // 4:
            return None
        # Where a warpgroup multiplies straight from shared memory; elsewhere 64 columns spill too.
        block_c = min(max(power_of_2(C), 16), 64 if card.arch == "sm_90" else 32)
        tile = (block_b + block_m) * block_c * element_size
        weights = block_b * block_m * element_size
        stages = min(max((card.shared_memory - weights) // tile, 2), 2 if card.is_amd else 4)
        return Config(block_b, block_m, block_c, 8 if block_m > 64 else 4, stages)


def forward(
    query: Tensor,
    memory: Tensor,
    values: Tensor | None,
    mode: str,
    top_k: int,
    threshold: float,
    keep_scores: bool,
) -> tuple[Tensor, Tensor]:
    """Answer [B, N, V], contiguous, and the scores [N, B, M] in float32, or none."""
    values = memory if values is None else values
    (B, N, C), (_, M, V) = query.shape, values.shape
    answer = query.new_empty(B, N, V)
    scores = query.new_empty((N, B, M) if keep_scores else (0,), dtype=torch.float32)
    with on_device(query):
        if M > LARGEST_SCORED:
            memory_search.search(query, memory, values, top_k, answer, scores)
            return answer, scores
        config = Config.choose(B, N, M, C, query.element_size(), card_of(query))
        if config and mode == "gumbel" and not keep_scores:
            _memory_lookup_forward_kernel[(triton.cdiv(B, config.block_b), N)](
                query, *query.stride(), memory, *memory.stride(), values, *values.stride(),
                answer, B, N, M, C, V,
                K=top_k, BLOCK_B=config.block_b, BLOCK_M=config.block_m, BLOCK_C=config.block_c,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            return answer, scores
        parts = multiply_in_parts(query.transpose(0, 1), memory.transpose(1, 2))
        if mode == "gumbel" and top_k <= FEW and not keep_scores and values.stride(2) == 1:
            answer_from_kept(parts, values[None], top_k, answer[:, None], 1, N)
            return answer, scores
        whole = len(parts) == 1
        added = scores if keep_scores and not whole else None
        weights = shrink(parts, mode, top_k, threshold, memory.dtype, added)
        multiply(weights, values, answer.transpose(0, 1))
    return answer, parts[0] if keep_scores and whole else scores


def backward(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    scores: Tensor,
    mode: str,
    top_k: int,
    threshold: float,
    memory_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and memory, contiguous; the latter empty unless ``memory_grad``."""
    (B, N, C), M = query.shape, memory.shape[1]
    grad_query = query.new_empty(B, N, C)
    grad_memory = query.new_empty((N, M, C) if memory_grad else (0,))
    q, g = query.transpose(0, 1), grad.transpose(0, 1)
    with on_device(query):
        kept = scores.numel() > 0
        parts = scores[None] if kept else multiply_in_parts(q, memory.transpose(1, 2))
        if M > LARGEST_SCORED:
            # Large products with nothing to fuse: the vendor's library is best at these.
            grad_parts = torch.bmm(g, memory.transpose(1, 2))[None]
            grad_scores = shrink_backward(grad_parts, parts, mode, threshold, memory.dtype)
            torch.bmm(grad_scores, memory, out=grad_query.transpose(0, 1))
        else:
            grad_parts = multiply_in_parts(g, memory.transpose(1, 2))
            grad_scores = shrink_backward(grad_parts, parts, mode, threshold, memory.dtype)
            multiply(grad_scores, memory, grad_query.transpose(0, 1))
        if memory_grad:
            weights = shrink(parts, mode, top_k, threshold, memory.dtype)
            multiply(weights.mT, g, grad_memory, grad_scores.mT, q)
    return grad_query, grad_memory
