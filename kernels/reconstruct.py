"""Reconstructions and their errors from the last maps, in one pass (paper sections 3.1 and 3.5).

    recon = sigmoid(bias + Σ_f weight[f] x[f])    errors[b, n] = mean of (recon - image)² in patch n

The maps are read once, in their own dtype, and nothing of their size is written. They may be those
of patches or of whole images: either is an address. A program sums the squares of its own places,
and PyTorch adds these up, so that the same inputs give the same bits.

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
def _reconstruct_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, images_ptr, recon_ptr, partial_ptr,
    stride_x_b, stride_x_f, stride_x_h, stride_x_w,
    stride_image_b, stride_image_h, stride_image_w,
    scale: tl.constexpr, WHOLE: tl.constexpr,
    P: tl.constexpr, h: tl.constexpr, w: tl.constexpr, F: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One tile of one patch. Grid: (patches * blocks of its places).

    x: [B P P, F, h, w] or, if WHOLE, [B, F, P h, P w], of any floating dtype. weight: float32 [F],
    bias: float32 [1]. images: [B, P h, P w], uint8 or floating, whose pixels are multiplied by
    ``scale``. recon: float32 [B, P h, P w], dense. partial: float32 [B P P, blocks], each program's
    share of the mean.
    """
    blocks: tl.constexpr = tl.cdiv(h * w, BLOCK_S)
    patch = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = place < h * w
    y, x = place // w, place % w
    image, n = patch // (P * P), patch % (P * P)
    top, left = n // P * h, n % P * w

    x_ptr += (image if WHOLE else patch) * stride_x_b
    if WHOLE:
        x_ptr += top * stride_x_h + left * stride_x_w
    x_ptrs = x_ptr + y.to(tl.int64) * stride_x_h + x.to(tl.int64) * stride_x_w
    logit = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        weight = tl.load(weight_ptr + f, mask=f < F, other=0.0)
        known = inside[:, None] & (f < F)[None, :]  # [BLOCK_S, BLOCK_F]
        ptrs = x_ptrs[:, None] + f.to(tl.int64)[None, :] * stride_x_f
        map_ = tl.load(ptrs, mask=known, other=0.0)
        logit += tl.sum(map_.to(tl.float32) * weight[None, :], axis=1)
    recon = tl.sigmoid(logit + tl.load(bias_ptr))

    images_ptr += image * stride_image_b + top * stride_image_h + left * stride_image_w
    images_ptrs = images_ptr + y.to(tl.int64) * stride_image_h + x.to(tl.int64) * stride_image_w
    pixel = tl.load(images_ptrs, mask=inside, other=0).to(tl.float32) * scale
    recon_ptr += image * (P * h * P * w) + top * (P * w) + left
    tl.store(recon_ptr + y * (P * w) + x, recon, mask=inside)
    square = tl.where(inside, (recon - pixel) * (recon - pixel), 0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(square, axis=0) / (h * w))


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
        # 8192 numbers are 64 a thread: in 16 bits, eight loads of 16 bytes in flight.
        block_f = min(power_of_2(F), 64)
        return Config(min(power_of_2(places), 8192 // block_f), block_f)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, images: Tensor, num_patch: int
) -> tuple[Tensor, Tensor]:
    """Reconstructions [B, 1, P h, P w] and errors [B, P P] of images, from maps ``x``."""
    B, _, H, W = images.shape
    P, F = num_patch, x.shape[1]
    h, w = H // P, W // P
    recon = images.new_empty((B, 1, H, W), dtype=torch.float32)
    config = Config.choose(h * w, F)
    blocks = triton.cdiv(h * w, config.block_s)
    partial = images.new_empty((B, P * P, blocks), dtype=torch.float32)
    with on_device(x):
        _reconstruct_forward_kernel[(partial.numel(),)](
            *(x, weight.reshape(F).contiguous(), bias, images, recon, partial),
            *(*x.stride(), images.stride(0), images.stride(2), images.stride(3)),
            *(1 / 255 if images.dtype == torch.uint8 else 1.0, x.shape[3] == W, P, h, w, F),
            BLOCK_S=config.block_s,
            BLOCK_F=config.block_f,
            num_warps=config.num_warps,
        )
    return recon, partial.sum(dim=2)
