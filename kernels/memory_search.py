"""Memory lookup by search, for memories of more slots than a program's registers hold scores.

Tiles of scores pass through a program, which keeps of each row the softmax's maximum and sum and
the k best scores with their slots. Several programs share the slots of a row block where rows are
few. A second kernel merges what they found and adds up the k - 1 slots that shrinkage keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, card_of, power_of_2
from .tiles import (
    NEVER,
    add_to_softmax,
    floored,
    insert_best,
    keep_above,
    multiply_tile,
    no_best,
    softmax_above,
)

# --- kernels: search ------------------------------------------------------------------------------


@triton.jit
def _search_forward_kernel(
    query_ptr, query_stride_b, query_stride_n, query_stride_c,
    memory_ptr, memory_stride_n, memory_stride_m, memory_stride_c,
    softmax_ptr, best_ptr, places_ptr, scores_ptr, B, M, C, tiles,
    K: tl.constexpr, K_TILE: tl.constexpr, KEEP_SCORES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the softmax needs, and the K best, of a share of the slots.

    Grid: (row blocks, PARTS, N). query [B, N, C], memory [N, M, C]; softmax [N, B, 2, PARTS]
    float32, maximum and sum of exponentials; best [N, B, PARTS, K_TILE] float32, places the same
    int32; scores [N, B, M] contiguous float32, written if KEEP_SCORES.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)

    maximum = tl.full([BLOCK_B], NEVER, tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    best, places = no_best(BLOCK_B, K, K_TILE)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(M, BLOCK_M))):
        slots = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        scores = multiply_tile(
            tl.zeros([BLOCK_B, BLOCK_M], tl.float32),
            query_ptr + n * query_stride_n, query_stride_b, query_stride_c,
            memory_ptr + n * memory_stride_n, memory_stride_c, memory_stride_m,
            rows, slots, B, M, C, 0, tl.cdiv(C, BLOCK_C), BLOCK_C, PRECISION,
        )  # fmt: skip
        if KEEP_SCORES:
            mask = (rows < B)[:, None] & (slots < M)[None, :]
            tl.store(scores_ptr + (n * B + rows)[:, None] * M + slots[None, :], scores, mask=mask)
        scores = tl.where((slots < M)[None, :], scores, NEVER)
        maximum, total = add_to_softmax(maximum, total, scores)
        best, places = insert_best(best, places, scores, tile * BLOCK_M)

    row_ids = n * B + rows
    tl.store(softmax_ptr + row_ids * 2 * PARTS + part, maximum, mask=rows < B)
    tl.store(softmax_ptr + row_ids * 2 * PARTS + PARTS + part, total, mask=rows < B)
    offsets = (row_ids * PARTS + part)[:, None] * K_TILE + tl.arange(0, K_TILE)[None, :]
    tl.store(best_ptr + offsets, best, mask=(rows < B)[:, None])
    tl.store(places_ptr + offsets, places, mask=(rows < B)[:, None])


@triton.jit
def _gather_forward_kernel(
    softmax_ptr, best_ptr, places_ptr,
    values_ptr, values_stride_n, values_stride_m, values_stride_v, answer_ptr, B, N, V,
    K: tl.constexpr, K_TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge what the search found for one row, and add up the values of the slots kept.

    Grid: (rows B * N, blocks of columns). Pointers as in the search; PARTS is a power of 2; values
    [N, M, V]; answer [B, N, V] contiguous.
    """
    b, n = (tl.program_id(0) // N).to(tl.int64), (tl.program_id(0) % N).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_id = n * B + b

    parts = row_id * 2 * PARTS + tl.arange(0, PARTS)
    maxima, totals = tl.load(softmax_ptr + parts), tl.load(softmax_ptr + PARTS + parts)
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(totals * tl.exp(maxima - maximum), axis=0)

    entries = tl.arange(0, PARTS * K_TILE)
    best = tl.load(best_ptr + row_id * PARTS * K_TILE + entries)
    places = tl.load(places_ptr + row_id * PARTS * K_TILE + entries)
    best = tl.where(entries % K_TILE >= K, NEVER, best)  # what the lists hold beyond K
    left = best
    for _ in range(1, K):
        left = tl.where(entries == tl.argmax(left, axis=0), NEVER, left)
    kth = tl.max(left, axis=0)
    p = softmax_above(best, kth, maximum, total)  # [PARTS * K_TILE]
    kept = keep_above(p, tl.exp(kth - maximum) / total)
    norm = floored(tl.sum(kept, axis=0))

    answer = tl.zeros([BLOCK_C], tl.float32) + (total - total)  # NaN if the row holds one
    left = tl.where(kept > 0, kept, 0.0)
    for _ in range(1, K):  # the K-th is never kept itself
        weight, at = tl.max(left, axis=0, return_indices=True)
        place = tl.sum(tl.where(entries == at, places, 0), axis=0).to(tl.int64)
        left = tl.where(entries == at, 0.0, left)
        value_ptrs = values_ptr + n * values_stride_n + place * values_stride_m
        value = tl.load(value_ptrs + columns * values_stride_v, mask=columns < V, other=0.0)
        answer += weight / norm * value.to(tl.float32)
    tl.store(answer_ptr + (b * N + n) * V + columns, answer, mask=columns < V)


# --- configuration and launcher -------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile of the search, and among how many programs the slots of a row block are shared."""

    block_b: int
    block_m: int
    block_c: int
    parts: int
    num_warps: int
    num_stages: int

    @staticmethod
    def choose(
        B: int, N: int, M: int, C: int, element_size: int, keep_scores: bool, card: Card
    ) -> Config:
        # Scores of 64 x 128 are 32 registers of a thread of 8 warps, the copy that loses its best
        # ones as many; 4 warps spill at fewer rows already. Float32 operands take room for three.
        largest = 64 if element_size == 2 else 16 if card.is_amd else 32
        if keep_scores and card.arch == "sm_80":  # where their addresses are too many for 64
            largest = 32
        block_b = min(max(power_of_2(B), 16), largest)
        if card.is_amd and block_b == 32:
            block_b = 16  # of 32 rows an MI300X has to spill, of 16 and of 64 not
        block_m = 128
        block_c = min(max(power_of_2(C), 16), 128 // element_size)
        # Two programs for every multiprocessor; a power of 2, for the kernel that merges.
        wanted = max(2 * card.multiprocessors // (triton.cdiv(B, block_b) * N), 1)
        parts = min(1 << (wanted.bit_length() - 1), power_of_2(triton.cdiv(M, block_m)), 64)
        tile = (block_b + block_m) * block_c * element_size
        stages = min(max(card.shared_memory // tile, 2), 2 if card.is_amd else 4)
        return Config(block_b, block_m, block_c, parts, 8, stages)


def search(
    query: Tensor, memory: Tensor, values: Tensor, top_k: int, answer: Tensor, scores: Tensor
) -> None:
    """Write the answer [B, N, V] and, unless it is empty, the scores [N, B, M]."""
    (B, N, C), (_, M, V) = query.shape, values.shape
    card = card_of(query)
    keep_scores = scores.numel() > 0
    config = Config.choose(B, N, M, C, query.element_size(), keep_scores, card)
    lists = {"K": top_k, "K_TILE": power_of_2(top_k), "PARTS": config.parts}
    softmax = query.new_empty((N, B, 2, config.parts), dtype=torch.float32)
    best = query.new_empty((N, B, config.parts, lists["K_TILE"]), dtype=torch.float32)
    places = torch.empty_like(best, dtype=torch.int32)
    tiles = triton.cdiv(triton.cdiv(M, config.block_m), config.parts)
    _search_forward_kernel[(triton.cdiv(B, config.block_b), config.parts, N)](
        query, *query.stride(), memory, *memory.stride(), softmax, best, places, scores, B, M, C,
        tiles, KEEP_SCORES=keep_scores, PRECISION=card.float32_precision, **lists,
        BLOCK_B=config.block_b, BLOCK_M=config.block_m, BLOCK_C=config.block_c,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    block_c = min(power_of_2(V), 1024)
    _gather_forward_kernel[(B * N, triton.cdiv(V, block_c))](
        softmax, best, places, values, *values.stride(), answer, B, N, V, BLOCK_C=block_c, **lists
    )
