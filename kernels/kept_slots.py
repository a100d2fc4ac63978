"""Answers of a lookup with Gumbel shrinkage, from scores of all slots: sums of the few kept.

weights     The k best slots of a row and their weights, instead of a weight for every slot.
answer      Sums of the k - 1 slots kept, in float32, from slots of any floating dtype or from parts
            that add up to them. A program takes few columns and many rows, so that all slots of its
            columns, 50 KB for 200 of them in float32, come from its L1 cache from the second tile
            on. A second product over all slots takes as long where it is one of bfloat16, and three
            times as long in float32.

Answers are written into maps [B, H, W, c] where the windows lie that were asked about. A row of a
window is one run of numbers: number t stands t // run rows below the first, and t % run behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, card_of, power_of_2
from .gumbel_shrinkage import load_rows
from .tiles import (
    NEVER,
    add_to_softmax,
    columns_of,
    floored,
    insert_best,
    keep_above,
    no_best,
    softmax_above,
    window,
)

FEW = 8
"""Largest k whose k - 1 slots are summed, where a product over all slots would do as well."""


@triton.jit
def _kept_weights_forward_kernel(
    scores_ptr, splits, weights_ptr, places_ptr, R, M, width,
    K: tl.constexpr, K_TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The K best slots of each row and the weights of Gumbel shrinkage; the K-th has none.

    scores [splits, R, width] float32, to be added; weights [R, K_TILE] float32, places [R, K_TILE]
    int32. All contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * width + columns[None, :]  # [BLOCK_R, BLOCK_M]
    stride_split = tl.cast(R, tl.int64) * width

    maximum = tl.full([BLOCK_R], NEVER, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    best, places = no_best(BLOCK_R, K, K_TILE)
    for start in range(0, M, BLOCK_M):
        inside = (rows < R)[:, None] & (start + columns < M)[None, :]
        tile = load_rows(scores_ptr, splits, stride_split, offsets + start, inside, NEVER)
        maximum, total = add_to_softmax(maximum, total, tile)
        best, places = insert_best(best, places, tile, start)

    spare = tl.arange(0, K_TILE)[None, :] >= K
    kth = tl.min(best, axis=1)
    p = softmax_above(best, kth[:, None], maximum[:, None], total[:, None])  # [BLOCK_R, K_TILE]
    kept = keep_above(p, (tl.exp(kth - maximum) / total)[:, None])
    kept = tl.where(spare, 0.0, kept)
    weights = kept / floored(tl.sum(kept, axis=1))[:, None]
    to = rows[:, None] * K_TILE + tl.arange(0, K_TILE)[None, :]
    tl.store(weights_ptr + to, weights, mask=(rows < R)[:, None])
    tl.store(places_ptr + to, places, mask=(rows < R)[:, None])


@triton.jit
def _kept_answer_forward_kernel(
    weights_ptr, places_ptr, slots_ptr, stride_part, stride_n, stride_m,
    answer_ptr, stride_b, stride_h, B, height, run, across, tiles,
    PARTS: tl.constexpr, K: tl.constexpr, K_TILE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of the slots kept. Grid: (column blocks, shares of the maps, N).

    weights, places and slots as above, of which the first PARTS parts are added up; answer
    [B, H, W, c] like the maps, of their dtype. Share s takes ``tiles`` tiles from s * ``tiles`` on.
    """
    share, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, columns = columns_of(tl.program_id(0), run, BLOCK_C)
    inside = (columns < run)[None, :]
    slot_ptrs = slots_ptr + n * stride_n + (row * run + columns)[None, :]
    answer_ptrs = window(answer_ptr, n, stride_h, height, run, across)
    answer_ptrs += (row * stride_h + columns)[None, :]

    for tile in range(share * tiles, tl.minimum((share + 1) * tiles, tl.cdiv(B, BLOCK_B))):
        b = tile * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
        answer = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        for j in tl.static_range(K):
            at = (n * B + b) * K_TILE + j
            weight = tl.load(weights_ptr + at, mask=b < B, other=0.0)[:, None]
            place = tl.load(places_ptr + at, mask=b < B, other=0)[:, None]
            value_ptrs = slot_ptrs + place.to(tl.int64) * stride_m
            kept = inside & (weight != 0)  # the others are not read
            value = tl.load(value_ptrs, mask=kept, other=0.0).to(tl.float32)
            for part in tl.static_range(1, PARTS):
                value += tl.load(value_ptrs + part * stride_part, mask=kept, other=0.0)
            answer += weight * value
        mask = (b < B)[:, None] & inside
        tl.store(answer_ptrs + b[:, None] * stride_b, answer, mask=mask)


# --- configuration and launcher -------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile of the answer, and among how many programs the rows of some columns are shared."""

    block_b: int
    block_c: int
    shares: int

    @staticmethod
    def choose(B: int, N: int, height: int, run: int, card: Card) -> Config:
        # 64 columns are a cache line of half precision. Four programs for every multiprocessor have
        # loads enough in flight, and their slots fit side by side into its L1 cache.
        block_b, block_c = min(power_of_2(B), 32), min(power_of_2(run), 64)
        programs = height * triton.cdiv(run, block_c) * N
        shares = min(4 * card.multiprocessors // programs, triton.cdiv(B, block_b))
        return Config(block_b, block_c, max(shares, 1))


def answer_from_kept(
    scores: Tensor, slots: Tensor, top_k: int, answer: Tensor, rows: int, columns: int
) -> None:
    """Write the answers to ``rows`` x ``columns`` windows of maps, N of them.

    scores [splits, N, B, width] float32, to be added, of which M columns count; slots [parts, N, M,
    C], the last dense, to be added; answer [B, H, W, c], the last two dense.
    """
    (splits, N, B, width), (parts, _, M, _) = scores.shape, slots.shape
    _, H, W, c = answer.shape
    height, run = H // rows, W // columns * c
    lists = {"K": top_k, "K_TILE": power_of_2(top_k)}
    weights = scores.new_empty(N, B, lists["K_TILE"])
    places = torch.empty_like(weights, dtype=torch.int32)
    # Four numbers a thread: as many registers as lists and addresses leave.
    block_m = min(power_of_2(M), 512)
    block_r = 512 // block_m
    _kept_weights_forward_kernel[(triton.cdiv(N * B, block_r),)](
        scores, splits, weights, places, N * B, M, width,
        BLOCK_R=block_r, BLOCK_M=block_m, num_warps=4, **lists,
    )  # fmt: skip
    config = Config.choose(B, N, height, run, card_of(answer))
    tiles = triton.cdiv(triton.cdiv(B, config.block_b), config.shares)
    grid = (height * triton.cdiv(run, config.block_c), config.shares, N)
    _kept_answer_forward_kernel[grid](
        weights, places, slots, *slots.stride()[:3], answer, *answer.stride()[:2],
        B, height, run, columns, tiles, PARTS=parts, **lists,
        BLOCK_B=config.block_b, BLOCK_C=config.block_c,
    )  # fmt: skip
