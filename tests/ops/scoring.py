"""The operations of scoring alone, in float64 and by slices: what their tests compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.samples import normal

SIZES = [(1, 5, 5), (2, 10, 10), (2, 6, 14), (3, 48, 48), (2, 96, 96), (1, 1, 1), (3, 3, 3)]
"""P, H, W of images: even, odd, one pixel a patch, and more places of a patch than a tile."""


def grey(B: int, H: int, W: int, dtype: torch.dtype = torch.float32, Cin: int = 1) -> Tensor:
    """Images of noise."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (B, Cin, H, W), generator=generator)
    return pixels.to(torch.uint8) if dtype == torch.uint8 else (pixels / 255).to(dtype)


def pixels_of(images: Tensor) -> Tensor:
    """In float64, from 0 to 1."""
    return images.double() / 255 if images.dtype == torch.uint8 else images.double()


def sliced(images: Tensor, P: int) -> Tensor:
    """Patches [B, N, ...] of images."""
    h, w = images.shape[2] // P, images.shape[3] // P
    cut = [images[..., i * h : i * h + h, j * w : j * w + w] for i in range(P) for j in range(P)]
    return torch.stack(cut, dim=1)


def plain_stem(images: Tensor, weight: Tensor, bias: Tensor, P: int) -> Tensor:
    patches = sliced(pixels_of(images), P).flatten(0, 1)
    return F.conv2d(patches, weight.double(), bias.double(), padding=1).relu()


def plain_reconstruction(
    x: Tensor, weight: Tensor, bias: Tensor, images: Tensor, P: int
) -> tuple[Tensor, Tensor]:
    """Of maps of whole images."""
    recon = torch.sigmoid(F.conv2d(x.double(), weight.double(), bias.double()))
    return recon, sliced((recon - pixels_of(images)).square(), P).mean(dim=(2, 3, 4))


def stem_weights(F_: int, Cin: int = 1) -> tuple[Tensor, Tensor]:
    return normal(F_, Cin, 3, 3, seed=1).float() / 3, normal(F_, seed=2).float() / 3


def head_weights(F_: int, Cin: int = 1) -> tuple[Tensor, Tensor]:
    return normal(Cin, F_, 1, 1, seed=3).float() / F_**0.5, normal(Cin, seed=4).float() / 3
