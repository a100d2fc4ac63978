"""First convolution of images [B, 1, P h, P w] (paper section 3.1), cut into P x P patches.

    out[b, n, :, y, x] = relu(bias + Σ_tap weight[tap] pixel(b, n, (y, x) + tap))    3 x 3 taps

Patches are addresses: a pixel is zero outside its patch, and stands where the patch begins plus
(y, x) inside. Bytes are widened where they are read. A pixel is read once for each of its taps by a
program and handed round through shared memory; a thread multiplies it by eight channels. Nine
multiplications in float32 for each number that is written are less work than to write it, so that
matrix units, for which pixels and weights would have to be split, are left out.

A model has one size of images, so sizes are compile-time constants: divisions become products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import on_device, power_of_2

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _stem_forward_kernel(
    images_ptr, weight_ptr, bias_ptr, out_ptr, stride_b, stride_h, stride_w,
    scale: tl.constexpr, P: tl.constexpr, h: tl.constexpr, w: tl.constexpr, F: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One tile of one patch. Grid: (patches * blocks of its places, channel blocks).

    images: [B, P h, P w], uint8 or floating, whose pixels are multiplied by ``scale``. weight:
    float32 [3, 3, F], bias: float32 [F], dense. out: [B P P, h w, F], dense, of any floating dtype.
    """
    blocks: tl.constexpr = tl.cdiv(h * w, BLOCK_S)
    patch = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    y, x = place // w, place % w
    n = patch % (P * P)
    images_ptr += patch // (P * P) * stride_b + n // P * h * stride_h + n % P * w * stride_w
    images_ptrs = images_ptr + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w

    total = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    for tap in tl.static_range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = (y + down >= 0) & (y + down < h) & (x + right >= 0) & (x + right < w)
        shifted = images_ptrs + (down * stride_h + right * stride_w)
        pixel = tl.load(shifted, mask=inside & (place < h * w), other=0).to(tl.float32)
        weight = tl.load(weight_ptr + tap * F + channel, mask=channel < F, other=0.0)
        total += pixel[:, None] * weight[None, :]
    bias = tl.load(bias_ptr + channel, mask=channel < F, other=0.0)
    total = total * scale + bias[None, :]
    total = tl.where(total <= 0, 0.0, total)  # asked this way round, NaN stays NaN
    out_ptrs = out_ptr + patch * (h * w * F) + place[:, None] * F + channel[None, :]
    tl.store(out_ptrs, total, mask=(place < h * w)[:, None] & (channel < F)[None, :])


# --- configuration and launchers ------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Places and channels of a tile."""

    block_s: int
    block_f: int
    num_warps: int = 4

    @staticmethod
    def choose(places: int, F: int) -> Config:
        """For patches of so many places."""
        # 8192 numbers are 64 a thread, which share the reading of eight pixels and of the weights;
        # 32 channels, of 16 bits, are stored by four threads side by side, 16 bytes each.
        block_f = min(power_of_2(F), 32)
        return Config(min(power_of_2(places), 8192 // block_f), block_f)


def forward(
    images: Tensor, weight: Tensor, bias: Tensor, num_patch: int, dtype: torch.dtype
) -> Tensor:
    """Maps [B P P, F, h, w] of ``dtype``, channels-last, of images [B, 1, P h, P w].

    The weight [F, 1, 3, 3] is copied unless its channels lie side by side in memory.
    """
    B, _, H, W = images.shape
    P, F = num_patch, weight.shape[0]
    h, w = H // P, W // P
    out = images.new_empty((B * P * P, h, w, F), dtype=dtype)
    config = Config.choose(h * w, F)
    blocks = triton.cdiv(h * w, config.block_s)
    with on_device(images):
        _stem_forward_kernel[(B * P * P * blocks, triton.cdiv(F, config.block_f))](
            *(images, weight.permute(2, 3, 1, 0).contiguous(), bias.contiguous(), out),
            *(images.stride(0), images.stride(2), images.stride(3)),
            *(1 / 255 if images.dtype == torch.uint8 else 1.0, P, h, w, F),
            BLOCK_S=config.block_s,
            BLOCK_F=config.block_f,
            num_warps=config.num_warps,
        )
    return out.permute(0, 3, 1, 2)
