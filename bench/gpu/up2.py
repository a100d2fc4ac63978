"""A map resized to twice its size, straight into the concatenation with a skip: a trial kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _up2_kernel(
    x_ptr, out_ptr, total, H, W,
    C: tl.constexpr, OUT_C: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [B, C, H, W] and out [B, OUT_C, 2H, 2W], channels last; channels from OFFSET on."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    c, pixel = index % C, index // C
    column = pixel % (2 * W)
    row = pixel // (2 * W) % (2 * H)
    image = pixel // (4 * W * H)
    y0, x0 = (row + 1) // 2 - 1, (column + 1) // 2 - 1
    weight_y = tl.where(row % 2 == 0, 0.75, 0.25)
    weight_x = tl.where(column % 2 == 0, 0.75, 0.25)
    y1, x1 = tl.minimum(y0 + 1, H - 1), tl.minimum(x0 + 1, W - 1)
    y0, x0 = tl.maximum(y0, 0), tl.maximum(x0, 0)
    above, below = (image * H + y0) * W, (image * H + y1) * W
    v00 = tl.load(x_ptr + (above + x0) * C + c, mask=inside, other=0).to(tl.float32)
    v01 = tl.load(x_ptr + (above + x1) * C + c, mask=inside, other=0).to(tl.float32)
    v10 = tl.load(x_ptr + (below + x0) * C + c, mask=inside, other=0).to(tl.float32)
    v11 = tl.load(x_ptr + (below + x1) * C + c, mask=inside, other=0).to(tl.float32)
    top = v00 + (v01 - v00) * weight_x
    low = v10 + (v11 - v10) * weight_x
    value = top + (low - top) * weight_y
    target = out_ptr + pixel * OUT_C + OFFSET + c
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=inside)


def resized(x: Tensor, skip: Tensor | None = None) -> Tensor:
    """The same by PyTorch."""
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return x if skip is None else torch.cat([skip, x], dim=1)


def up2(x: Tensor, skip: Tensor | None = None) -> Tensor:
    """Bilinear interpolation of maps [B, C, H, W] to [B, S + C, 2H, 2W], behind S skip channels."""
    B, C, H, W = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    skipped = 0 if skip is None else skip.shape[1]
    shape = (B, skipped + C, 2 * H, 2 * W)
    out = x.new_empty(shape).to(memory_format=torch.channels_last)
    if skip is not None:
        out[:, :skipped].copy_(skip)
    total = 4 * B * C * H * W
    grid = (triton.cdiv(total, _BLOCK),)
    _up2_kernel[grid](x, out, total, H, W, C, skipped + C, skipped, _BLOCK, num_warps=4)
    return out
