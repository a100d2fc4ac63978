"""The reconstruction and its errors in scoring: operator and PyTorch implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from ..utils.patches import to_image, to_patches
from .common import (
    DECOMPOSITIONS,
    as_floats,
    check_floating,
    check_images,
    check_no_gradient,
    kernels,
    operator,
    shape,
    wide,
)


def _reconstruct_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, images: Tensor, num_patch: int
) -> tuple[Tensor, Tensor]:
    if x.shape[3] != images.shape[3]:
        x = to_image(x, num_patch)
    recon = torch.sigmoid(F.conv2d(wide(x), weight, bias)).contiguous()
    squares = to_patches((recon - as_floats(images, recon.dtype)).square(), num_patch)
    return recon, squares.mean(dim=(1, 2, 3)).view(images.shape[0], -1)


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
    check_images(images, num_patch)
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
