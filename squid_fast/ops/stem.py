"""The first convolution of scoring: operator and PyTorch implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from ..utils.patches import to_patches
from .common import as_floats, check_images, check_no_gradient, kernels, operator, shape


def _stem_cpu(
    images: Tensor, weight: Tensor, bias: Tensor, num_patch: int, dtype: torch.dtype
) -> Tensor:
    patches = to_patches(as_floats(images, weight.dtype), num_patch)
    maps = F.conv2d(patches, weight, bias, padding=1).relu_().to(dtype)
    return maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@operator(_stem_cpu)
def _stem(
    images: Tensor, weight: Tensor, bias: Tensor, num_patch: int, dtype: torch.dtype
) -> Tensor:
    if dispatch.serves_stem(images, weight, num_patch, dtype):
        return kernels("stem").forward(images, weight, bias, num_patch, dtype)
    return _stem_cpu(images, weight, bias, num_patch, dtype)


@_stem.register_fake
def _(images, weight, bias, num_patch, dtype):  # type: ignore[no-untyped-def]
    B, _, H, W = images.shape
    P = num_patch
    sizes = (B * P * P, H // P, W // P, weight.shape[0])
    return images.new_empty(sizes, dtype=dtype).permute(0, 3, 1, 2)


def stem(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_patch: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``relu(conv(patches of images))``: the encoder's first convolution, for scoring.

    Paper section 3.1. Images [B, Cin, H, W] become maps [B * N, F, H / P, W / P], N = P * P, patch
    index fastest, channels-last, of ``dtype``. Every patch is padded with zeros by itself. Computed
    in float32 or wider.

    Args:
        images: floating in [0, 1], or uint8, of which 255 is 1.
        weight, bias: [F, Cin, 3, 3] and [F], stride and padding being 1.
        num_patch: P, which divides H and W.

    Raises:
        ValueError: a shape or dtype does not fit, or a gradient is asked for.

    >>> white = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    >>> maps = stem(white, torch.ones(1, 1, 3, 3), torch.zeros(1), num_patch=2)
    >>> maps.shape, maps.unique()  # in patches of 2 x 2, every pixel has four neighbours and itself
    (torch.Size([4, 1, 2, 2]), tensor([4.]))
    """
    check_images(images, num_patch)
    if weight.dim() != 4 or weight.shape[1:] != (images.shape[1], 3, 3):
        fitting = f"[F, {images.shape[1]}, 3, 3]"
        raise ValueError(f"weight is {shape(weight)}; {fitting} would fit these images.")
    if bias.shape != (weight.shape[0],):
        raise ValueError(f"bias is {shape(bias)}; [{weight.shape[0]}] would fit this weight.")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; a floating-point dtype is needed.")
    check_no_gradient("stem", images, weight, bias)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return _stem(images, weight.to(wide), bias.to(wide), num_patch, dtype)
