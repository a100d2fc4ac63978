"""A linear layer of float32 rows on matrix units of 16 bits (in-painting, paper section 3.3).

    out = x Wᵀ + bias    x = xₕ + xₗ, W = Wₕ + Wₗ    x Wᵀ ≈ xₗ Wₕᵀ + xₕ Wₗᵀ + xₕ Wₕᵀ

The high part is what a number is in 16 bits, the low part what that leaves over, in 16 bits too. In
bfloat16 two parts hold 16 bits of a number, and the product that is left out is as small as what
they miss. Rows are split in registers, weights beforehand. Three products take a fifth of
the time of one in float32, for which NVIDIA's cards have no matrix units.

Few rows make few tiles: then the sums are cut into parts, which PyTorch adds up, so that the same
inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from .card import Card, card_of, on_device, power_of_2

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _split_linear_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, R, S, T, stride_x_r, stride_low, blocks_s, steps,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One tile of one part, of ``steps`` steps of BLOCK_T. Grid: (row * column blocks, parts).

    x: float32 [R, T], its last stride 1. weight: bfloat16 or float16 [2, S, T], high and low part,
    dense. bias: float32 [S], or None. out: float32 [parts, R, S], dense.
    """
    r = (tl.program_id(0) // blocks_s).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    s = (tl.program_id(0) % blocks_s).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    x_ptrs = x_ptr + r[:, None] * stride_x_r
    weight_ptrs = weight_ptr + s[None, :] * T

    total = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
    part = tl.program_id(1)
    for step in range(part * steps, (part + 1) * steps):
        t = step * BLOCK_T + tl.arange(0, BLOCK_T)
        x = tl.load(x_ptrs + t[None, :], mask=(r < R)[:, None] & (t < T)[None, :], other=0.0)
        mask = (t < T)[:, None] & (s < S)[None, :]  # [BLOCK_T, BLOCK_S]
        high = tl.load(weight_ptrs + t[:, None], mask=mask, other=0.0)
        low = tl.load(weight_ptrs + stride_low + t[:, None], mask=mask, other=0.0)
        x_high = x.to(high.dtype)
        x_low = (x - x_high.to(tl.float32)).to(high.dtype)
        # Added up apart from the total, which has to wait for the products: a warpgroup reads rows
        # from registers while it multiplies, and Triton lets the next step overwrite them unless
        # something in this one uses the result (triton-lang/triton#9433).
        product = tl.dot(x_low, high)
        product = tl.dot(x_high, low, product)
        total += tl.dot(x_high, high, product)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + s, mask=(s < S) & (part == 0), other=0.0)[None, :]
    mask = (r < R)[:, None] & (s < S)[None, :]
    row = part.to(tl.int64) * R + r
    tl.store(out_ptr + row[:, None] * S + s[None, :], total, mask=mask)


# --- configuration and launchers ------------------------------------------------------------------


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
    @lru_cache(maxsize=1024)
    def choose(R: int, S: int, T: int, card: Card) -> Config:
        """The tile that keeps a multiprocessor busy for the shortest time."""

        def programs(block_r: int, block_s: int) -> int:
            return triton.cdiv(R, block_r) * triton.cdiv(S, block_s)

        def cost(tile: tuple[int, int]) -> int:
            # In the time of reading one number, a matrix unit multiplies some 32.
            block_r, block_s = tile
            rounds = triton.cdiv(programs(*tile), card.multiprocessors)
            return rounds * (block_r * block_s // 32 + block_r + block_s)

        block_r, block_s = min(
            (
                (block_r, block_s)
                for block_r in (128, 64, 32, 16)
                if block_r <= max(power_of_2(R), 16)
                for block_s in (128, 64, 32)
                if block_s <= max(power_of_2(S), 32)
            ),
            key=cost,
        )
        column = 4 * (block_r + block_s)  # bytes: rows in float32, weights in two parts
        # 64 columns of weights are a cache line. Cards of less shared memory have no warpgroups,
        # which multiply weights out of it; others hold a step in registers, where so many spill.
        block_t = 64 if card.shared_memory >= 200 * 1024 else 32
        block_t = min(max(power_of_2(T), 16), block_t)
        stages = min(card.shared_memory // (column * block_t) - 1, 2 if card.is_amd else 3)
        warps = 8 if block_r * block_s >= 8192 else 4
        # Four programs of small tiles run side by side; a part is worth four steps.
        room = card.multiprocessors * (4 if block_r * block_s <= 2048 else 1)
        most = max(triton.cdiv(T, block_t) // 4, 1)
        parts = min(max(room // programs(block_r, block_s), 1), most)
        return Config(block_r, block_s, block_t, parts, warps, stages)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 [R, S] of rows [R, T] and of weights in two parts [2, S, T]."""
    (R, T), S = x.shape, weight.shape[1]
    config = Config.choose(R, S, T, card_of(x))
    out = x.new_empty(config.parts, R, S)
    blocks_r, blocks_s = triton.cdiv(R, config.block_r), triton.cdiv(S, config.block_s)
    steps = triton.cdiv(triton.cdiv(T, config.block_t), config.parts)
    x, weight = x if x.stride(1) == 1 else x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    with on_device(x):
        _split_linear_forward_kernel[(blocks_r * blocks_s, config.parts)](
            *(x, weight, bias, out, R, S, T, x.stride(0), weight.stride(0), blocks_s, steps),
            BLOCK_R=config.block_r,
            BLOCK_S=config.block_s,
            BLOCK_T=config.block_t,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out[0] if config.parts == 1 else out.sum(dim=0)
