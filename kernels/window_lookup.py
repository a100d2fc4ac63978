"""Memory lookup of the windows of maps, read and answered in place, for scoring.

    S = sum_p window . slots_p^T    W = shrink(S)    answer = W . sum_p slots_p    (at each place n)

The lookup of ``memory_lookup`` with Gumbel shrinkage, made for the decoder's maps [B, c, H, W] in
half precision. They lie channels-last: a row of a window is one run of numbers, so that a window is
an address, and neither a copy of it nor a map in float32 is ever written. The slots are parameters
in float32. They are split once into ``parts`` of half precision which add up to them: a number of a
map has 8 bits in bfloat16, one of a slot 24 or three times 8, and three products of bfloat16 on the
matrix units, added up in float32, are all that a product in float32 would be.

Maps in float32, such as the features that the in-painting's queue is asked about, are split into as
many parts in registers. Of the nine products of three parts with three, six are taken: the others
are smaller than the last bit of a product in float32.

A block of maps meets all slots, which are what is read most: with 128 maps to a program, each part
is read by few programs. Sums are split over the width until the card is full. ``kept_slots`` adds
them up, selects, and sums the slots kept.

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
from .kept_slots import answer_from_kept
from .tiles import columns_of, window

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _window_scores_forward_kernel(
    maps_ptr, stride_b, stride_h, slots_ptr, stride_part, stride_n, stride_m, scores_ptr,
    B, N, M, width, height, run, across, blocks_m, steps,
    PARTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of maps against a block of slots. Grid: (map blocks, slot blocks * splits, N).

    slots [PARTS, N, M, C], the last dense, bfloat16 or float16; maps [B, H, W, c], the last two
    dense, of the same dtype or float32; scores [splits, N, B, width] contiguous float32, without
    meaning beyond M. Windows have ``height`` rows of ``run`` numbers, C = height * run. Split s
    sums over the ``steps`` steps from s * ``steps`` on.

    What 8 warps can multiply at once leaves few registers for addresses: they are 32 bits from
    where the block begins, and beyond its last map or slot that one is read again, without a mask.
    """
    IN_PIECES: tl.constexpr = maps_ptr.dtype.element_ty == tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    left = tl.minimum(B - first, BLOCK_B).to(tl.int32)
    b = tl.arange(0, BLOCK_B)
    m = (tl.program_id(1) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    split, n = tl.program_id(1) // blocks_m, tl.program_id(2).to(tl.int64)
    maps_ptr += first * stride_b
    maps_ptr = window(maps_ptr, n, stride_h, height, run, across)
    slots_ptr += n * stride_n

    total = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    last = tl.minimum((split + 1) * steps, height * tl.cdiv(run, BLOCK_C))
    for step in range(split * steps, last):
        row, columns = columns_of(step, run, BLOCK_C)
        inside = columns < run
        at = tl.minimum(b, left - 1)[:, None] * stride_b + columns[None, :]
        x = tl.load(maps_ptr + row * stride_h + at, mask=inside[None, :], other=0.0)
        at = columns[:, None] + tl.minimum(m, M - 1)[None, :] * stride_m
        # Pieces of maps in float32 are in registers, which warpgroups read as they multiply. Added
        # up apart from the total, their products are waited for (see split_linear.py).
        product = tl.zeros([BLOCK_B, BLOCK_M], tl.float32) if IN_PIECES else total
        for part in tl.static_range(PARTS):
            part_ptr = slots_ptr + part * stride_part + row * run
            slots = tl.load(part_ptr + at, mask=inside[:, None], other=0.0)
            rest = x  # of float32, the parts i with i + part < PARTS
            for _ in tl.static_range(PARTS - part if IN_PIECES else 1):
                piece = rest.to(slots.dtype)
                product = tl.dot(piece, slots, product)
                rest -= piece
        total = total + product if IN_PIECES else product

    mask = (b < left)[:, None] & (m < width)[None, :]
    scores_ptr += ((split.to(tl.int64) * N + n) * B + first) * width
    tl.store(scores_ptr + b[:, None] * width + m[None, :], total, mask=mask)


# --- configuration and launcher -------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile of the scores, and into how many sums over the width they are split."""

    block_b: int
    block_m: int
    block_c: int
    splits: int
    num_warps: int
    num_stages: int

    @staticmethod
    @lru_cache(maxsize=1024)
    def choose(
        B: int, N: int, M: int, height: int, run: int, parts: int, element_size: int, card: Card
    ) -> Config:
        # 200 slots in one tile, so that maps are read once; 128 maps by 256 slots are 128 registers
        # of a thread of 8 warps. Maps in float32 have two such tiles, the total and a step's sums.
        block_m = min(max(power_of_2(M), 16), 256)
        block_b = min(max(power_of_2(B), 16), 128 if element_size == 2 else 64)
        # The parts of the slots fill the shared memory: 32 columns of 256 slots are 48 KB.
        block_c = min(max(power_of_2(run), 16), 32)
        stage = (block_b * element_size + parts * block_m * 2) * block_c
        stages = min(max(card.shared_memory // stage, 2), 2 if card.is_amd else 4)
        steps = height * triton.cdiv(run, block_c)
        programs = triton.cdiv(B, block_b) * triton.cdiv(M, block_m) * N

        def cost(splits: int) -> int:
            # Rounds, as if every multiprocessor ran one program at a time. A program begins with
            # an empty pipeline and ends by writing its scores, as long as about four steps.
            rounds = triton.cdiv(programs * splits, card.multiprocessors)
            return rounds * (triton.cdiv(steps, splits) + 4)

        splits = min(range(1, min(steps, 64) + 1), key=cost)
        warps = 8 if block_b * block_m >= 4096 else 4
        return Config(block_b, block_m, block_c, splits, warps, stages)


def forward(
    maps: Tensor, slots: Tensor, values: Tensor | None, top_k: int, rows: int, columns: int
) -> Tensor:
    """Answers [B, c, H, W], channels-last, of ``rows`` x ``columns`` windows to a map.

    With values [N, M, V], their sums [B, N, V].
    """
    (B, c, H, W), (parts, N, M, _) = maps.shape, slots.shape
    x, slots = maps.permute(0, 2, 3, 1), slots.contiguous()
    if x.stride()[2:] != (c, 1) or x.stride(0) >= 2**24:
        x = x.contiguous()
    height, run = H // rows, W // columns * c
    config = Config.choose(B, N, M, height, run, parts, maps.element_size(), card_of(maps))
    width = triton.cdiv(M, 16) * 16  # rows of scores that begin at 64 bytes are stored in fours
    scores = maps.new_empty((config.splits, N, B, width), dtype=torch.float32)
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
        if values is not None:
            sums = values.new_empty(B, N, values.shape[2])
            answer_from_kept(scores, values.contiguous()[None], top_k, sums[:, None], 1, N)
            return sums
        answer = torch.empty_like(x, memory_format=torch.contiguous_format)
        # In half precision two parts suffice: 16 bits at least, twice as many as an answer has.
        summed = slots if maps.dtype == torch.float32 else slots[:2]
        answer_from_kept(scores, summed, top_k, answer, rows, columns)
    return answer.permute(0, 3, 1, 2)
