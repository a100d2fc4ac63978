"""Memory lookup of the windows of maps, read and answered in place, for scoring.

    S = sum_p window . slots_p^T    W = shrink(S)    answer = W . sum_p slots_p    (at each place n)

The lookup of ``memory_lookup`` with Gumbel shrinkage, made for the decoder's maps [B, c, H, W] in
half precision. They lie channels-last: a row of a window is one run of numbers, so that a window is
an address, and neither a copy of it nor a map in float32 is ever written. The slots are parameters
in float32. They are split once into ``parts`` of half precision which add up to them: a number of a
map has 8 bits in bfloat16, one of a slot 24 or three times 8, and three products of bfloat16 on the
matrix units, added up in float32, are all that a product in float32 would be.

Three kernels, since a few row blocks would leave most multiprocessors idle and the scores are few:

scores      A block of maps against all slots, which are what is read most: with 128 maps a program
            each part is used as soon as it is there. Sums are split over the width until the card
            is full, and added up by the next kernel.
weights     The k best slots of a row and their weights, instead of a weight for every slot.
answer      Sums of the k - 1 slots kept. Against a second product over all slots, which takes three
            products too as the weights would have to be split: the same bytes from the L2 cache for
            256 images (0.5 GB for windows of 8192 numbers), half of them for one image, and
            no operations to speak of. A program takes few columns and many maps, so that the 200
            slots, 50 KB of them, come from its L1 cache from the second tile on.

Sums are taken in one order, whatever the timing: the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, card_of, on_device, power_of_2
from .gumbel_shrinkage import load_rows
from .tiles import NEVER, add_to_softmax, floored, insert_best, keep_above, no_best, softmax_above

# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def _window(maps_ptr, n, stride_h, height, run, across):
    """Where window n of the first map begins, of ``across`` windows beside each other."""
    return maps_ptr + (n // across) * height * stride_h + (n % across) * run


@triton.jit
def _columns(step, run, BLOCK_C: tl.constexpr):
    """The row of a window that a step of BLOCK_C numbers lies in, and their places in that row."""
    steps = tl.cdiv(run, BLOCK_C)
    return step // steps, (step % steps) * BLOCK_C + tl.arange(0, BLOCK_C)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _window_scores_forward_kernel(
    maps_ptr, stride_b, stride_h, slots_ptr, stride_part, stride_n, stride_m, scores_ptr,
    B, N, M, width, height, run, across, blocks_m, steps,
    PARTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of maps against a block of slots. Grid: (map blocks, slot blocks * splits, N).

    maps [B, H, W, c], the last two dense, and slots [PARTS, N, M, C], the last dense, bfloat16 or
    float16; scores [splits, N, B, width] contiguous float32, without meaning beyond M. Windows have
    ``height`` rows of ``run`` numbers, C = height * run. Split s sums over the ``steps`` steps from
    s * ``steps`` on.

    What 8 warps can multiply at once leaves few registers for addresses: they are 32 bits from
    where the block begins, and beyond its last map or slot that one is read again, without a mask.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    left = tl.minimum(B - first, BLOCK_B).to(tl.int32)
    b = tl.arange(0, BLOCK_B)
    m = (tl.program_id(1) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    split, n = tl.program_id(1) // blocks_m, tl.program_id(2).to(tl.int64)
    maps_ptr += first * stride_b
    maps_ptr = _window(maps_ptr, n, stride_h, height, run, across)
    slots_ptr += n * stride_n

    total = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    last = tl.minimum((split + 1) * steps, height * tl.cdiv(run, BLOCK_C))
    for step in range(split * steps, last):
        row, columns = _columns(step, run, BLOCK_C)
        inside = columns < run
        at = tl.minimum(b, left - 1)[:, None] * stride_b + columns[None, :]
        x = tl.load(maps_ptr + row * stride_h + at, mask=inside[None, :], other=0.0)
        at = columns[:, None] + tl.minimum(m, M - 1)[None, :] * stride_m
        for part in tl.static_range(PARTS):
            part_ptr = slots_ptr + part * stride_part + row * run
            total = tl.dot(x, tl.load(part_ptr + at, mask=inside[:, None], other=0.0), total)

    mask = (b < left)[:, None] & (m < width)[None, :]
    scores_ptr += ((split.to(tl.int64) * N + n) * B + first) * width
    tl.store(scores_ptr + b[:, None] * width + m[None, :], total, mask=mask)


@triton.jit
def _window_weights_forward_kernel(
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
def _window_answer_forward_kernel(
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
    row, columns = _columns(tl.program_id(0), run, BLOCK_C)
    inside = (columns < run)[None, :]
    slot_ptrs = slots_ptr + n * stride_n + (row * run + columns)[None, :]
    answer_ptrs = _window(answer_ptr, n, stride_h, height, run, across)
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
    """Tiles of the products and of the answer, and how the work of each is shared."""

    block_b: int
    block_m: int
    block_c: int
    splits: int
    num_warps: int
    num_stages: int
    answer_b: int
    answer_c: int
    shares: int

    @staticmethod
    @lru_cache(maxsize=1024)
    def choose(B: int, N: int, M: int, height: int, run: int, parts: int, card: Card) -> Config:
        # 200 slots in one tile, so that maps are read once; 128 maps by 256 slots are 128 registers
        # of a thread of 8 warps.
        block_m = min(max(power_of_2(M), 16), 256)
        block_b = min(max(power_of_2(B), 16), 128)
        # The parts of the slots fill the shared memory: 32 columns of 256 slots are 48 KB.
        block_c = min(max(power_of_2(run), 16), 32)
        stage = (block_b + parts * block_m) * block_c * 2
        stages = min(max(card.shared_memory // stage, 2), 2 if card.is_amd else 4)
        steps = height * triton.cdiv(run, block_c)
        programs = triton.cdiv(B, block_b) * triton.cdiv(M, block_m) * N

        def cost(splits: int) -> int:
            # Rounds, as if every multiprocessor ran one program at a time. A program begins with
            # an empty pipeline and ends by writing its scores, as long as about four steps.
            rounds = triton.cdiv(programs * splits, card.multiprocessors)
            return rounds * (triton.cdiv(steps, splits) + 4)

        splits = min(range(1, min(steps, 64) + 1), key=cost)
        # 64 columns are a cache line. Four programs for every multiprocessor have loads enough in
        # flight, and the slots of their columns fit side by side into its L1 cache.
        answer_b, answer_c = min(power_of_2(B), 32), min(power_of_2(run), 64)
        programs = height * triton.cdiv(run, answer_c) * N
        shares = max(min(4 * card.multiprocessors // programs, triton.cdiv(B, answer_b)), 1)
        warps = 8 if block_b * block_m >= 4096 else 4
        return Config(block_b, block_m, block_c, splits, warps, stages, answer_b, answer_c, shares)


def forward(maps: Tensor, slots: Tensor, top_k: int, rows: int, columns: int) -> Tensor:
    """Answers [B, c, H, W], channels-last, of ``rows`` x ``columns`` windows to a map."""
    (B, c, H, W), (parts, N, M, _) = maps.shape, slots.shape
    x, slots = maps.permute(0, 2, 3, 1), slots.contiguous()
    if x.stride()[2:] != (c, 1) or x.stride(0) >= 2**24:
        x = x.contiguous()
    answer = torch.empty_like(x, memory_format=torch.contiguous_format)
    height, run = H // rows, W // columns * c
    config = Config.choose(B, N, M, height, run, parts, card_of(maps))
    width = triton.cdiv(M, 16) * 16  # rows of scores that begin at 64 bytes are stored in fours
    scores = maps.new_empty((config.splits, N, B, width), dtype=torch.float32)
    weights = maps.new_empty((N, B, power_of_2(top_k)), dtype=torch.float32)
    places = torch.empty_like(weights, dtype=torch.int32)
    lists = {"K": top_k, "K_TILE": power_of_2(top_k)}
    blocks_m = triton.cdiv(M, config.block_m)
    steps = triton.cdiv(height * triton.cdiv(run, config.block_c), config.splits)
    with on_device(maps):
        grid = (triton.cdiv(B, config.block_b), blocks_m * config.splits, N)
        _window_scores_forward_kernel[grid](
            x, *x.stride()[:2], slots, *slots.stride()[:3], scores,
            B, N, M, width, height, run, columns, blocks_m, steps, PARTS=parts,
            BLOCK_B=config.block_b, BLOCK_M=config.block_m, BLOCK_C=config.block_c,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        # Four numbers a thread: as many registers as lists and addresses leave.
        block_m = min(power_of_2(M), 1024)
        block_r = 1024 // block_m
        _window_weights_forward_kernel[(triton.cdiv(N * B, block_r),)](
            scores, config.splits, weights, places, N * B, M, width,
            BLOCK_R=block_r, BLOCK_M=block_m, num_warps=8, **lists,
        )  # fmt: skip
        # Two parts are 16 bits at least, twice as many as the answer is rounded to.
        tiles = triton.cdiv(triton.cdiv(B, config.answer_b), config.shares)
        grid = (height * triton.cdiv(run, config.answer_c), config.shares, N)
        _window_answer_forward_kernel[grid](
            weights, places, slots, *slots.stride()[:3], answer, *answer.stride()[:2],
            B, height, run, columns, tiles, PARTS=min(parts, 2), **lists,
            BLOCK_B=config.answer_b, BLOCK_C=config.answer_c,
        )  # fmt: skip
    return answer.permute(0, 3, 1, 2)
