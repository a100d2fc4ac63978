"""Batched products of small matrices of any strides, split so that they fill a card.

    out[n] = a[n] . x[n] (+ b[n] . y[n])        a, b: [N, R, T]    x, y: [N, T, S]    out: [N, R, S]

The products of the memory lookup, of a batch of rows and a few hundred slots at each of a few
places: so small that tiles alone leave most multiprocessors idle. The tile, and the number of parts
into which the sums are split, are those that send the fewest bytes through any multiprocessor.
Parts are written side by side and added up by the kernel that reads them, in one order, so that the
same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, card_of, power_of_2
from .tiles import multiply_tile


@triton.jit
def _product_kernel(
    a_ptr, a_stride_n, a_stride_r, a_stride_t, x_ptr, x_stride_n, x_stride_t, x_stride_s,
    b_ptr, b_stride_n, b_stride_r, b_stride_t, y_ptr, y_stride_n, y_stride_t, y_stride_s,
    out_ptr, out_stride_part, out_stride_n, out_stride_r, R, S, T, blocks_s, steps,
    PAIR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one part. Grid: (row blocks, column blocks * parts, N).

    a, x, and if PAIR b, y: as above, all of one dtype; out [parts, N, R, S] of any floating dtype,
    its last stride 1. Part p sums over the ``steps`` steps of BLOCK_T from p * ``steps`` on.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    s = (tl.program_id(1) % blocks_s).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    part, n = tl.program_id(1) // blocks_s, tl.program_id(2).to(tl.int64)

    total = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
    total = multiply_tile(
        total, a_ptr + n * a_stride_n, a_stride_r, a_stride_t,
        x_ptr + n * x_stride_n, x_stride_t, x_stride_s,
        r, s, R, S, T, part * steps, (part + 1) * steps, BLOCK_T, PRECISION,
    )  # fmt: skip
    if PAIR:
        total = multiply_tile(
            total, b_ptr + n * b_stride_n, b_stride_r, b_stride_t,
            y_ptr + n * y_stride_n, y_stride_t, y_stride_s,
            r, s, R, S, T, part * steps, (part + 1) * steps, BLOCK_T, PRECISION,
        )  # fmt: skip
    out_ptr += part.to(tl.int64) * out_stride_part + n * out_stride_n
    mask = (r < R)[:, None] & (s < S)[None, :]
    tl.store(out_ptr + r[:, None] * out_stride_r + s[None, :], total, mask=mask)


@dataclass(frozen=True)
class Config:
    """Tile and parts of a product."""

    block_r: int
    block_s: int
    block_t: int
    parts: int
    num_warps: int
    num_stages: int

    @staticmethod
    @lru_cache(maxsize=1024)  # looking through the candidates takes longer than the product
    def choose(
        N: int, R: int, S: int, T: int, element_size: int, card: Card, most_parts: int
    ) -> Config:
        """The tile and number of parts that send the fewest bytes through one multiprocessor.

        Large tiles read less; small ones, and parts, spread the reading; parts are written, and
        read once more. Rounds are counted as if every multiprocessor ran one program at a time.
        """
        block_t = min(max(power_of_2(T), 16), 128 // element_size)  # 128 bytes: a cache line
        steps = triton.cdiv(T, block_t)
        # Accumulators of 128 x 128 are 64 registers a thread of 8 warps. Float32 operands, which
        # NVIDIA's units take in three pieces, leave room for fewer.
        largest = 4096 if element_size == 4 else 16384

        def cost(config: Config) -> int:
            tiles = triton.cdiv(R, config.block_r) * triton.cdiv(S, config.block_s) * N
            rounds = triton.cdiv(tiles * config.parts, card.multiprocessors)
            columns = triton.cdiv(steps, config.parts) * block_t
            reading = (config.block_r + config.block_s) * columns * element_size
            writing = config.block_r * config.block_s * 4
            adding = config.parts * N * R * S * 4 // card.multiprocessors
            return rounds * (reading + writing) + adding

        def config(block_r: int, block_s: int, parts: int) -> Config:
            tile = (block_r + block_s) * block_t * element_size
            stages = min(max(card.shared_memory // tile - 1, 2), 2 if card.is_amd else 4)
            warps = 8 if block_r * block_s * element_size >= 16384 else 4
            return Config(block_r, block_s, block_t, parts, warps, stages)

        candidates = (
            config(block_r, block_s, parts)
            for block_r in (128, 64, 32, 16)
            if block_r <= max(power_of_2(R), 16)
            for block_s in (128, 64, 32)
            if block_s <= max(power_of_2(S), 32) and block_r * block_s <= largest
            for parts in range(1, min(most_parts, steps) + 1)
        )
        return min(candidates, key=cost)


def multiply(
    a: Tensor, x: Tensor, out: Tensor, b: Tensor | None = None, y: Tensor | None = None
) -> None:
    """Write a . x (+ b . y) to ``out`` [N, R, S], whose last stride is 1."""
    _launch(_configure(a, x, 1), a, x, out[None], b, y)


def multiply_in_parts(a: Tensor, x: Tensor) -> Tensor:
    """a . x as [parts, N, R, S] in float32, for the reader to add up."""
    config = _configure(a, x, 32)
    parts = a.new_empty((config.parts, a.shape[0], a.shape[1], x.shape[2]), dtype=torch.float32)
    _launch(config, a, x, parts)
    return parts


def _configure(a: Tensor, x: Tensor, most_parts: int) -> Config:
    (N, R, T), S = a.shape, x.shape[2]
    return Config.choose(N, R, S, T, a.element_size(), card_of(a), most_parts)


def _launch(
    config: Config,
    a: Tensor,
    x: Tensor,
    out: Tensor,
    b: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    (N, R, T), S = a.shape, x.shape[2]
    pair = b is not None and y is not None
    if b is None or y is None:
        b, y = a, x  # whose strides have to be there, though nothing is read
    blocks_s = triton.cdiv(S, config.block_s)
    steps = triton.cdiv(triton.cdiv(T, config.block_t), config.parts)
    _product_kernel[(triton.cdiv(R, config.block_r), blocks_s * config.parts, N)](
        a, *a.stride(), x, *x.stride(), b, *b.stride(), y, *y.stride(),
        out, *out.stride()[:3], R, S, T, blocks_s, steps, PAIR=pair,
        BLOCK_R=config.block_r, BLOCK_S=config.block_s, BLOCK_T=config.block_t,
        PRECISION=card_of(a).float32_precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
