"""Masked shortcut of maps [B, C, H, W] (paper section 3.3), forward and backward.

    out = x where kept, else shortcut    x = inpainted, or relu(scale inpainted + shift)

A copy that chooses its source, so only bytes count. Which positions are kept is never stored:
Philox makes it from the seed and the position's number, in the backward again, once for all
channels of a tile. Maps are seen as [B, C, S] with any strides, S = H W, and of them channels-last
ones have stride 1 along C, contiguous ones along S. Triton compiles anew for a stride of 1, and
makes loads and stores 16 bytes wide along that axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import on_device, power_of_2
from .tiles import map_at

# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def _draw(seed_ptr, position, keep_probability: tl.constexpr):
    """Which positions take ``inpainted``: [BLOCK_S, 1].

    Positions stay in 32 bits: of 64-bit ones ``tl.rand`` makes other numbers.
    """
    return (tl.rand(tl.load(seed_ptr), position) < keep_probability)[:, None]


@triton.jit
def _affine(x, scale_ptr, shift_ptr, channel, C):
    """x * scale + shift in float32 [BLOCK_S, BLOCK_C], and scale [1, BLOCK_C]."""
    scale = tl.load(scale_ptr + channel, mask=channel < C, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=channel < C, other=0.0)
    return x.to(tl.float32) * scale + shift, scale


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _masked_shortcut_forward_kernel(
    inpainted_ptr, shortcut_ptr, out_ptr, seed_ptr, scale_ptr, shift_ptr, positions, S, C,
    stride_inpainted_b, stride_inpainted_c, stride_inpainted_s,
    stride_shortcut_b, stride_shortcut_c, stride_shortcut_s,
    stride_out_b, stride_out_c, stride_out_s,
    keep_probability: tl.constexpr, SELECTIVE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """inpainted, shortcut, out: [B, C, S] of one dtype: float32, bfloat16 or float16.

    seed: int64 []. scale, shift: float32 [C], or None. positions: B S. SELECTIVE: load only what
    the draw chooses.
    """
    position = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (position < positions)[:, None] & (channel < C)  # [BLOCK_S, BLOCK_C]
    keep = _draw(seed_ptr, position, keep_probability)
    chosen = inside & keep if SELECTIVE else inside
    passed_over = inside ^ chosen if SELECTIVE else inside

    x_at = map_at(position, channel, S, stride_inpainted_b, stride_inpainted_c, stride_inpainted_s)
    y_at = map_at(position, channel, S, stride_shortcut_b, stride_shortcut_c, stride_shortcut_s)
    x = tl.load(inpainted_ptr + x_at, mask=chosen, other=0.0)
    y = tl.load(shortcut_ptr + y_at, mask=passed_over, other=0.0)
    if scale_ptr is not None:
        a, _ = _affine(x, scale_ptr, shift_ptr, channel, C)
        x = tl.where(a <= 0, 0.0, a).to(y.dtype)  # asked this way round, NaN stays NaN
    out_at = map_at(position, channel, S, stride_out_b, stride_out_c, stride_out_s)
    tl.store(out_ptr + out_at, tl.where(keep, x, y), mask=inside)


@triton.jit
def _masked_shortcut_backward_kernel(
    grad_ptr, inpainted_ptr, grad_inpainted_ptr, grad_shortcut_ptr, partial_ptr,
    seed_ptr, scale_ptr, shift_ptr, positions, S, C,
    stride_grad_b, stride_grad_c, stride_grad_s,
    stride_inpainted_b, stride_inpainted_c, stride_inpainted_s,
    stride_out_b, stride_out_c, stride_out_s,
    keep_probability: tl.constexpr, SELECTIVE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad, inpainted, grad_inpainted, grad_shortcut: [B, C, S] of one dtype, as in the forward.

    The latter two have the strides called out. partial: float32 [2, position blocks, C], this
    tile's share in the gradients of scale and shift. seed: int64 []. scale, shift: float32 [C], or
    None, and then neither inpainted nor partial is touched.
    """
    position = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (position < positions)[:, None] & (channel < C)  # [BLOCK_S, BLOCK_C]
    keep = _draw(seed_ptr, position, keep_probability)

    grad_at = map_at(position, channel, S, stride_grad_b, stride_grad_c, stride_grad_s)
    out_at = map_at(position, channel, S, stride_out_b, stride_out_c, stride_out_s)
    grad = tl.load(grad_ptr + grad_at, mask=inside, other=0.0)
    tl.store(grad_shortcut_ptr + out_at, tl.where(keep, 0.0, grad), mask=inside)
    if scale_ptr is None:
        grad_x = tl.where(keep, grad, 0.0)
    else:
        x_at = map_at(
            position, channel, S, stride_inpainted_b, stride_inpainted_c, stride_inpainted_s
        )
        chosen = inside & keep if SELECTIVE else inside
        x = tl.load(inpainted_ptr + x_at, mask=chosen, other=0.0).to(tl.float32)
        a, scale = _affine(x, scale_ptr, shift_ptr, channel, C)
        opens = keep & (a > 0)
        grad_a = tl.where(opens, grad.to(tl.float32), 0.0)
        grad_x = grad_a * scale
        # Not grad_a * x alone: what the mask leaves out may be NaN.
        grad_scale = tl.sum(tl.where(opens, grad_a * x, 0.0), axis=0)[None, :]
        grad_shift = tl.sum(grad_a, axis=0)[None, :]
        to_scale = tl.program_id(0).to(tl.int64) * C + channel
        to_shift = to_scale + tl.num_programs(0).to(tl.int64) * C
        tl.store(partial_ptr + to_scale, grad_scale, mask=channel < C)
        tl.store(partial_ptr + to_shift, grad_shift, mask=channel < C)
    tl.store(grad_inpainted_ptr + out_at, grad_x.to(grad.dtype), mask=inside)


# --- configuration and launchers ------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Positions and channels of a tile, and whether the draw masks the loads."""

    block_s: int
    block_c: int
    selective: bool
    num_warps: int = 4

    @staticmethod
    def choose(*operands: Tensor, largest: int = 4096) -> Config:
        """For operands [B, C, S] of which no more need be read than the draw chooses."""
        B, C, S = operands[0].shape
        # 4096 elements are 32 a thread, in bfloat16 four 16-byte loads in flight. 64 of them are a
        # whole cache line along either axis, and so many channels make a draw cheap.
        block_c = min(power_of_2(C), 64)
        block_s = min(power_of_2(B * S), largest // block_c)
        # With neighbouring channels side by side the draw switches whole vectors, and memory that
        # is not needed is not read. Side by side in memory, positions would be torn apart by it.
        selective = all(x.stride(1) == 1 != x.stride(2) for x in operands)
        return Config(block_s, block_c, selective)


def _empty(x: Tensor, y: Tensor) -> Tensor:
    """A result for operands ``x`` and ``y``, with the strides that the operators' fakes promise.

    These are of ``torch.where(x[:, :1].bool(), x, y)``, which in dense maps are those of ``x``.
    """
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    a, b = (torch.empty_strided(z.shape, z.stride(), device="meta") for z in (x, y))
    return x.new_empty_strided(x.shape, torch.where(a[:, :1].bool(), a, b).stride())


def _filled(out: Tensor, flat: Tensor) -> Tensor:
    """``out``, given ``out.flatten(2)``: a copy where rows and columns do not merge to one axis."""
    return out if flat.data_ptr() == out.data_ptr() else out.copy_(flat.view(out.shape))


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(
    inpainted: Tensor,
    shortcut: Tensor,
    keep_probability: float,
    seed: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """Maps [B, C, H, W] blended; with scale and shift, of ``relu(inpainted * scale + shift)``."""
    result = _empty(inpainted, shortcut)
    x, y, out = inpainted.flatten(2), shortcut.flatten(2), result.flatten(2)
    B, C, S = x.shape
    config = Config.choose(x, y)
    grid = triton.cdiv(B * S, config.block_s), triton.cdiv(C, config.block_c)
    with on_device(x):
        _masked_shortcut_forward_kernel[grid](
            *(x, y, out, seed, _dense(scale), _dense(shift)),
            *(B * S, S, C, *x.stride(), *y.stride(), *out.stride()),
            keep_probability=keep_probability,
            SELECTIVE=config.selective,
            BLOCK_S=config.block_s,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    return _filled(result, out)


def backward(
    grad: Tensor,
    inpainted: Tensor | None,
    keep_probability: float,
    seed: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inpainted, shortcut, scale and shift; without the latter, these are empty.

    The sums are the same from run to run: every program writes its own, and PyTorch adds them up.
    """
    results = _empty(grad, grad), _empty(grad, grad)
    g, x = grad.flatten(2), (grad if inpainted is None else inpainted).flatten(2)
    to_inpainted, to_shortcut = (z.flatten(2) for z in results)
    B, C, S = g.shape
    # With an affine, its two sums take registers of their own.
    config = Config.choose(x, largest=4096 if scale is None else 2048)
    grid = triton.cdiv(B * S, config.block_s), triton.cdiv(C, config.block_c)
    partial = None if scale is None else scale.new_empty(2, grid[0], C)
    with on_device(g):
        _masked_shortcut_backward_kernel[grid](
            *(g, x, to_inpainted, to_shortcut, partial, seed, _dense(scale), _dense(shift)),
            *(B * S, S, C, *g.stride(), *x.stride(), *to_inpainted.stride()),
            keep_probability=keep_probability,
            SELECTIVE=config.selective,
            BLOCK_S=config.block_s,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    grad_inpainted = _filled(results[0], to_inpainted)
    grad_shortcut = _filled(results[1], to_shortcut)
    if partial is None:
        return grad_inpainted, grad_shortcut, grad.new_empty(0), grad.new_empty(0)
    return grad_inpainted, grad_shortcut, partial[0].sum(0), partial[1].sum(0)
