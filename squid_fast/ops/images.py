"""The two ends of the network in scoring, where images are read: operators, implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from .common import (
    DECOMPOSITIONS,
    as_floats,
    check_floating,
    check_no_gradient,
    check_patches,
    kernels,
    operator,
    shape,
    wide,
)
from .patches import to_image, to_patches


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


def patch_errors(recon: Tensor, images: Tensor, num_patch: int) -> Tensor:
    """Mean squared errors of patches [B, N] of reconstructions, both images [B, Cin, H, W]."""
    squares = to_patches((recon - as_floats(images, recon.dtype)).square(), num_patch)
    return squares.mean(dim=(1, 2, 3)).view(-1, num_patch * num_patch)


def _reconstruct_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, images: Tensor, num_patch: int
) -> tuple[Tensor, Tensor]:
    if x.shape[3] != images.shape[3]:
        x = to_image(x, num_patch)
    recon = torch.sigmoid(F.conv2d(wide(x), weight, bias)).contiguous()
    return recon, patch_errors(recon, images, num_patch)


@operator(_reconstruct_cpu)
def _reconstruct(
    x: Tensor, weight: Tensor, bias: Tensor, images: Tensor, num_patch: int
) -> tuple[Tensor, Tensor]:
    if dispatch.serves_reconstruct(x, images):
        return kernels("reconstruct").forward(x, weight, bias, images, num_patch)
    return _reconstruct_cpu(x, weight, bias, images, num_patch)


@_reconstruct.register_fake
def _(x, weight, bias, images, num_patch):  # type: ignore[no-untyped-def]
    recon = images.new_empty(images.shape, dtype=weight.dtype)
    return recon, recon.new_empty(images.shape[0], num_patch * num_patch)


DECOMPOSITIONS[torch.ops.squid_fast.reconstruct.default] = _reconstruct_cpu


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
    check_patches(images, num_patch)
    if weight.dim() != 4 or weight.shape[1:] != (images.shape[1], 3, 3):
        fitting = f"[F, {images.shape[1]}, 3, 3]"
        raise ValueError(f"weight is {shape(weight)}; {fitting} would fit these images.")
    if bias.shape != (weight.shape[0],):
        raise ValueError(f"bias is {shape(bias)}; [{weight.shape[0]}] would fit this weight.")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; a floating-point dtype is needed.")
    check_no_gradient("stem", images, weight, bias)
    weight = wide(weight)
    return _stem(images, weight, bias.to(weight.dtype), num_patch, dtype)


def reconstruct(
    x: Tensor, weight: Tensor, bias: Tensor, images: Tensor, num_patch: int
) -> tuple[Tensor, Tensor]:
    """Reconstructions of images from the decoder's last maps, and how far they are off.

    Paper sections 3.1 and 3.5, for scoring: ``sigmoid(conv(x))`` [B, Cin, H, W] with a convolution
    of 1 x 1, and the mean squared error [B, N] of each of the N = P * P patches. Both are computed
    in float32, or in float64 for maps of float64.

    Args:
        x: [B, F, H, W], or the maps of patches [B * N, F, H / P, W / P], patch index fastest.
        weight, bias: [Cin, F, 1, 1] and [Cin].
        images: [B, Cin, H, W], floating in [0, 1], or uint8, of which 255 is 1.
        num_patch: P, which divides H and W.

    Raises:
        ValueError: a shape or dtype does not fit, or a gradient is asked for.

    >>> maps, weight, bias = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 1, 1), torch.zeros(1)
    >>> images = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    >>> recon, errors = reconstruct(maps, weight, bias, images, num_patch=2)
    >>> recon.unique(), errors
    (tensor([0.5000]), tensor([[0.2500, 0.2500, 0.0000, 0.0000]]))
    """
    check_patches(images, num_patch)
    check_floating("x", x)
    (B, Cin, H, W), P = images.shape, num_patch
    sizes = ((B, H, W), (B * P * P, H // P, W // P))
    if x.dim() != 4 or (x.shape[0], *x.shape[2:]) not in sizes:
        raise ValueError(
            f"x is {shape(x)}; [{B}, F, {H}, {W}] or, of patches, [{B * P * P}, F, {H // P}, "
            f"{W // P}] would fit images {shape(images)}."
        )
    if weight.shape != (Cin, x.shape[1], 1, 1) or bias.shape != (Cin,):
        raise ValueError(
            f"weight is {shape(weight)} and bias {shape(bias)}; [{Cin}, {x.shape[1]}, 1, 1] and "
            f"[{Cin}] would fit."
        )
    check_no_gradient("reconstruct", x, weight, bias, images)
    dtype = wide(x).dtype
    return _reconstruct(x, weight.to(dtype), bias.to(dtype), images, num_patch)
