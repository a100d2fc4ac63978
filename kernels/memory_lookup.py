"""Space-aware memory lookup (paper section 3.2), forward and backward.

    S = query . memory^T    W = shrink(S)    answer = W . memory               (at each place n)
    dW = grad . memory^T    dS = shrink'(dW, S)    grad_query = dS . memory
                            grad_memory = W^T . grad + dS^T . query

Three ways forward, by the number of slots and of rows:

one pass    Up to 512 slots and rows enough to fill the card: a program computes the scores of a row
            block into registers, shrinks them there and multiplies the weights with the memory.
two steps   Few rows: they alone would leave most multiprocessors idle, so the products are split
            over slots and width, and a second kernel adds the parts, shrinks and combines, each
            program for its share of the width. The backward goes this way at every number of rows,
            since two row blocks of scores do not fit into the registers.
search      More slots: tiles of scores pass through, of which a program remembers maximum, sum and
            the k best with their places; a second kernel merges these and gathers the k slots. The
            backward writes its scores to memory, as every later step needs all of them.

Sums are taken in one order, whatever the timing: the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gumbel_shrinkage, memory_search
from .card import on_device
from .choice import LARGEST_TILE
from .memory_plan import Config, Plan
from .tiles import EPSILON, NEVER, floored, keep_above, kth_largest, score_tile

# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def combine(
    weights, memory_ptr, memory_stride_m, memory_stride_c, answer_ptr,
    rows, slots, n, B, N, M, C, first_step, last_step, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store weights [BLOCK_B, BLOCK_M] times slots, over the steps of BLOCK_C columns named."""
    weights = weights.to(answer_ptr.dtype.element_ty)
    slot_ptrs = memory_ptr + slots[:, None] * memory_stride_m
    answer_ptrs = answer_ptr + (rows * N + n)[:, None] * C
    for step in range(first_step, last_step):
        columns = step * BLOCK_C + tl.arange(0, BLOCK_C)
        slot_mask = (slots < M)[:, None] & (columns < C)[None, :]
        slot = tl.load(slot_ptrs + columns[None, :] * memory_stride_c, mask=slot_mask, other=0.0)
        answer = tl.dot(weights, slot, input_precision=PRECISION)  # [BLOCK_B, BLOCK_C]
        answer_mask = (rows < B)[:, None] & (columns < C)[None, :]
        tl.store(answer_ptrs + columns[None, :], answer, mask=answer_mask)


@triton.jit
def add_parts(parts_ptr, stride_part, offsets, mask, PARTS: tl.constexpr):
    """Sum [BLOCK_B, BLOCK_M] of the parts into which the products were split."""
    total = tl.load(parts_ptr + offsets, mask=mask, other=0.0)
    for part in range(1, PARTS):
        total += tl.load(parts_ptr + part * stride_part + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def softmax(scores, mask):
    """Softmax over slots, of which there is none where ``mask`` is false: [BLOCK_B, BLOCK_M]."""
    masked = tl.where(mask, scores, NEVER)
    exponentials = tl.exp(masked - tl.max(masked, axis=1)[:, None])
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit
def shrink(scores, mask, MODE: tl.constexpr, K: tl.constexpr, THRESHOLD: tl.constexpr):
    """Weights [BLOCK_B, BLOCK_M] of scores, 0 where ``mask`` says that there is no slot."""
    if MODE == "raw":
        return tl.where(mask, scores, 0.0)
    if MODE == "gumbel":
        p = softmax(scores, mask)
        kept = keep_above(p, kth_largest(p, K))
    else:
        kept = keep_above(
            tl.where(mask, scores, NEVER), tl.full([scores.shape[0]], THRESHOLD, tl.float32)
        )
    return kept / floored(tl.sum(kept, axis=1))[:, None]


@triton.jit
def shrink_backward(grad, scores, mask, MODE: tl.constexpr, THRESHOLD: tl.constexpr):
    """Gradient of the scores from that of the weights; all [BLOCK_B, BLOCK_M]."""
    if MODE == "raw":
        return grad
    if MODE == "gumbel":  # straight through to the softmax
        p = softmax(scores, mask)
        return p * (grad - tl.sum(p * grad, axis=1)[:, None])
    # kept = u s / (u + eps) for u = s - threshold > 0; weights = kept / max(sum kept, eps)
    u = tl.where(mask, scores, NEVER) - THRESHOLD
    inverse = 1 / (tl.maximum(u, 0.0) + EPSILON)
    kept = tl.where(u <= 0, 0.0, u * scores * inverse)
    total = tl.sum(kept, axis=1)
    through_total = tl.sum(grad * kept, axis=1) / (floored(total) * floored(total))
    through_total = tl.where(total <= EPSILON, 0.0, through_total)
    grad_kept = grad / floored(total)[:, None] - through_total[:, None]
    return tl.where(u <= 0, 0.0, grad_kept * (scores + u - kept) * inverse)


# --- kernels: one pass ----------------------------------------------------------------------------


@triton.jit
def _one_pass_forward_kernel(
    query_ptr, query_stride_b, query_stride_n, query_stride_c,
    memory_ptr, memory_stride_n, memory_stride_m, memory_stride_c,
    answer_ptr, scores_ptr, B, N, M, C,
    MODE: tl.constexpr, K: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCORES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows against all slots of its place. Grid: (row blocks, N).

    query [B, N, C], memory [N, M, C], of one dtype; answer [B, N, C] contiguous, of the same;
    scores [N, B, M] contiguous float32, written if KEEP_SCORES.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1).to(tl.int64)
    slots = tl.arange(0, BLOCK_M)
    memory_ptr += n * memory_stride_n

    scores = score_tile(
        query_ptr + n * query_stride_n, query_stride_b, query_stride_c,
        memory_ptr, memory_stride_m, memory_stride_c,
        rows, slots, B, M, C, 0, tl.cdiv(C, BLOCK_C), BLOCK_C, PRECISION,
    )  # fmt: skip
    mask = (rows < B)[:, None] & (slots < M)[None, :]
    if KEEP_SCORES:
        tl.store(scores_ptr + (n * B + rows)[:, None] * M + slots[None, :], scores, mask=mask)
    weights = shrink(scores, (slots < M)[None, :], MODE, K, THRESHOLD)
    combine(
        weights, memory_ptr, memory_stride_m, memory_stride_c, answer_ptr,
        rows, slots, n, B, N, M, C, 0, tl.cdiv(C, BLOCK_C), BLOCK_C, PRECISION,
    )  # fmt: skip


# --- kernels: two steps ---------------------------------------------------------------------------


@triton.jit
def _scores_kernel(
    x_ptr, x_stride_b, x_stride_n, x_stride_c,
    memory_ptr, memory_stride_n, memory_stride_m, memory_stride_c,
    parts_ptr, B, N, M, C, slot_blocks, steps,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of rows and slots over a share of the width.

    Grid: (row blocks, slot blocks * parts, N). x [B, N, C], memory [N, M, C], of one dtype; parts
    [parts, N, B, M] contiguous float32, part i of the steps from i * ``steps`` on.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = (tl.program_id(1) // slot_blocks).to(tl.int64)
    slots = (tl.program_id(1) % slot_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(2).to(tl.int64)
    first_step = part.to(tl.int32) * steps

    scores = score_tile(
        x_ptr + n * x_stride_n, x_stride_b, x_stride_c,
        memory_ptr + n * memory_stride_n, memory_stride_m, memory_stride_c,
        rows, slots, B, M, C, first_step, first_step + steps, BLOCK_C, PRECISION,
    )  # fmt: skip
    offsets = ((part * N + n) * B + rows)[:, None] * M + slots[None, :]
    tl.store(parts_ptr + offsets, scores, mask=(rows < B)[:, None] & (slots < M)[None, :])


@triton.jit
def _combine_forward_kernel(
    parts_ptr, memory_ptr, memory_stride_n, memory_stride_m, memory_stride_c,
    answer_ptr, scores_ptr, B, N, M, C, steps,
    MODE: tl.constexpr, K: tl.constexpr, THRESHOLD: tl.constexpr,
    KEEP_SCORES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the parts, shrink, and combine slots over a share of the width.

    Grid: (row blocks, shares of ``steps`` steps, N). parts [PARTS, N, B, M] and scores [N, B, M]
    contiguous float32, the latter written if KEEP_SCORES; memory [N, M, C]; answer [B, N, C]
    contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(2).to(tl.int64)
    slots = tl.arange(0, BLOCK_M)
    first_step = tl.program_id(1) * steps

    mask = (rows < B)[:, None] & (slots < M)[None, :]
    offsets = (n * B + rows)[:, None] * M + slots[None, :]
    scores = add_parts(parts_ptr, tl.cast(N, tl.int64) * B * M, offsets, mask, PARTS)
    if KEEP_SCORES:
        tl.store(scores_ptr + offsets, scores, mask=mask & (tl.program_id(1) == 0))
    weights = shrink(scores, (slots < M)[None, :], MODE, K, THRESHOLD)
    combine(
        weights, memory_ptr + n * memory_stride_n, memory_stride_m, memory_stride_c, answer_ptr,
        rows, slots, n, B, N, M, C, first_step, first_step + steps, BLOCK_C, PRECISION,
    )  # fmt: skip


@triton.jit
def _combine_backward_kernel(
    grad_parts_ptr, parts_ptr, memory_ptr, memory_stride_n, memory_stride_m, memory_stride_c,
    grad_query_ptr, weights_ptr, grad_scores_ptr, B, N, M, C, steps,
    MODE: tl.constexpr, K: tl.constexpr, THRESHOLD: tl.constexpr, MEMORY_GRAD: tl.constexpr,
    GRAD_PARTS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores, and of the query over a share of the width.

    Grid: (row blocks, shares of ``steps`` steps, N). grad_parts [GRAD_PARTS, N, B, M] and parts
    [PARTS, N, B, M] contiguous float32; memory [N, M, C]; grad_query [B, N, C] contiguous; weights
    and grad_scores [N, B, M] contiguous in the dtype of the memory, written if MEMORY_GRAD.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(2).to(tl.int64)
    slots = tl.arange(0, BLOCK_M)
    first_step = tl.program_id(1) * steps

    mask = (rows < B)[:, None] & (slots < M)[None, :]
    offsets = (n * B + rows)[:, None] * M + slots[None, :]
    stride_part = tl.cast(N, tl.int64) * B * M
    scores = add_parts(parts_ptr, stride_part, offsets, mask, PARTS)
    if MEMORY_GRAD:
        first = mask & (tl.program_id(1) == 0)
        weights = shrink(scores, (slots < M)[None, :], MODE, K, THRESHOLD)
        tl.store(weights_ptr + offsets, weights, mask=first)
    grad = add_parts(grad_parts_ptr, stride_part, offsets, mask, GRAD_PARTS)
    grad_scores = shrink_backward(grad, scores, (slots < M)[None, :], MODE, THRESHOLD)
    if MEMORY_GRAD:
        tl.store(grad_scores_ptr + offsets, grad_scores, mask=first)
    combine(
        grad_scores, memory_ptr + n * memory_stride_n, memory_stride_m, memory_stride_c,
        grad_query_ptr, rows, slots, n, B, N, M, C, first_step, first_step + steps,
        BLOCK_C, PRECISION,
    )  # fmt: skip


@triton.jit
def _slot_gradient_kernel(
    weights_ptr, grad_scores_ptr,
    grad_ptr, grad_stride_b, grad_stride_n, grad_stride_c,
    query_ptr, query_stride_b, query_stride_n, query_stride_c,
    grad_memory_ptr, B, M, C,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W^T . grad + dS^T . query, every program over all rows, so without atomics.

    Grid: (slot blocks, blocks of columns, N). weights, grad_scores [N, B, M] contiguous; grad,
    query [B, N, C]; grad_memory [N, M, C] contiguous; all of one dtype.
    """
    slots = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
    grad_ptrs = grad_ptr + n * grad_stride_n + columns[None, :] * grad_stride_c
    query_ptrs = query_ptr + n * query_stride_n + columns[None, :] * query_stride_c

    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, B, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B).to(tl.int64)
        weight_mask = (slots < M)[:, None] & (rows < B)[None, :]
        weight_offsets = (n * B + rows)[None, :] * M + slots[:, None]  # [BLOCK_M, BLOCK_B]
        row_mask = (rows < B)[:, None] & (columns < C)[None, :]
        weights = tl.load(weights_ptr + weight_offsets, mask=weight_mask, other=0.0)
        grad = tl.load(grad_ptrs + rows[:, None] * grad_stride_b, mask=row_mask, other=0.0)
        total = tl.dot(weights, grad, total, input_precision=PRECISION)
        grad_scores = tl.load(grad_scores_ptr + weight_offsets, mask=weight_mask, other=0.0)
        query = tl.load(query_ptrs + rows[:, None] * query_stride_b, mask=row_mask, other=0.0)
        total = tl.dot(grad_scores, query, total, input_precision=PRECISION)
    offsets = (n * M + slots)[:, None] * C + columns[None, :]
    tl.store(grad_memory_ptr + offsets, total, mask=(slots < M)[:, None] & (columns < C)[None, :])


# --- launchers ------------------------------------------------------------------------------------


def _scores(plan: Plan, x: Tensor, memory: Tensor, config: Config) -> Tensor:
    """Products [parts, N, B, M] of x [B, N, C] with the slots, in float32."""
    B, N, M, C = plan.B, plan.N, plan.M, plan.C
    parts = x.new_empty((config.parts, N, B, M), dtype=torch.float32)
    slot_blocks = triton.cdiv(M, config.block_m)
    grid = (triton.cdiv(B, config.block_b), slot_blocks * config.parts, N)
    _scores_kernel[grid](
        x, *x.stride(), memory, *memory.stride(), parts, B, N, M, C,
        slot_blocks, plan.steps_of(config), **plan.options(config),
    )  # fmt: skip
    return parts


def forward(
    query: Tensor, memory: Tensor, mode: str, top_k: int, threshold: float, keep_scores: bool
) -> tuple[Tensor, Tensor]:
    """Answer [B, N, C], contiguous, and the scores [N, B, M] in float32, or none."""
    plan = Plan.of(query, memory)
    B, N, M, C = plan.B, plan.N, plan.M, plan.C
    answer = query.new_empty(B, N, C)
    scores = query.new_empty((N, B, M) if keep_scores else (0,), dtype=torch.float32)
    shrinkage = {"MODE": mode, "K": top_k, "THRESHOLD": threshold}
    with on_device(query):
        if M > LARGEST_TILE:
            memory_search.search(plan, query, memory, top_k, answer, scores)
            return answer, scores
        if config := plan.one_pass():
            _one_pass_forward_kernel[(triton.cdiv(B, config.block_b), N)](
                query, *query.stride(), memory, *memory.stride(), answer, scores, B, N, M, C,
                KEEP_SCORES=keep_scores, **shrinkage, **plan.options(config),
            )  # fmt: skip
            return answer, scores
        parts = _scores(plan, query, memory, plan.scores())
        split = len(parts) > 1
        if keep_scores and not split:
            scores = parts[0]
        config = plan.combine()
        _combine_forward_kernel[(triton.cdiv(B, config.block_b), config.parts, N)](
            parts, memory, *memory.stride(), answer, scores, B, N, M, C, plan.steps_of(config),
            KEEP_SCORES=keep_scores and split, PARTS=len(parts),
            **shrinkage, **plan.options(config),
        )  # fmt: skip
    return answer, scores


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
    plan = Plan.of(query, memory)
    B, N, M, C = plan.B, plan.N, plan.M, plan.C
    grad_query = query.new_empty(B, N, C)
    weights, grad_scores = (memory.new_empty((N, B, M) if memory_grad else (0,)) for _ in "WS")
    with on_device(query):
        grad_parts = _scores(plan, grad, memory, plan.scores())
        kept = scores.numel() > 0
        parts = scores[None] if kept else _scores(plan, query, memory, plan.scores())
        if M > LARGEST_TILE:
            logits = parts.sum(dim=0)
            grad_scores = gumbel_shrinkage.backward(grad_parts.sum(dim=0), logits, memory.dtype)
            # A large matrix product with nothing to fuse: the vendor's library is best at that.
            torch.bmm(grad_scores, memory, out=grad_query.transpose(0, 1))
            if memory_grad:
                weights = gumbel_shrinkage.forward(logits, top_k, memory.dtype)
        else:
            config = plan.combine()
            _combine_backward_kernel[(triton.cdiv(B, config.block_b), config.parts, N)](
                grad_parts, parts, memory, *memory.stride(), grad_query, weights, grad_scores,
                B, N, M, C, plan.steps_of(config), MODE=mode, K=top_k, THRESHOLD=threshold,
                MEMORY_GRAD=memory_grad, GRAD_PARTS=len(grad_parts), PARTS=len(parts),
                **plan.options(config),
            )  # fmt: skip
        if not memory_grad:
            return grad_query, memory.new_empty(0)
        grad_memory = query.new_empty(N, M, C)
        config = plan.slot_gradient()
        grid = (triton.cdiv(M, config.block_m), triton.cdiv(C, config.block_c), N)
        _slot_gradient_kernel[grid](
            weights, grad_scores, grad, *grad.stride(), query, *query.stride(), grad_memory,
            B, M, C, **plan.options(config),
        )  # fmt: skip
    return grad_query, grad_memory
