"""Patches of an image: cut out and put together."""

from __future__ import annotations

import torch
from torch import Tensor


def to_patches(x: Tensor, num_patch: int) -> Tensor:
    """[B, C, H, W] -> [B*N, C, H/P, W/P], row-major, patch index fastest; keeps the layout."""
    B, C, H, W = x.shape
    P = num_patch
    if _is_channels_last(x):
        x = x.permute(0, 2, 3, 1).reshape(B, P, H // P, P, W // P, C).transpose(2, 3)
        return x.reshape(B * P * P, H // P, W // P, C).permute(0, 3, 1, 2)
    x = x.reshape(B, C, P, H // P, P, W // P).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B * P * P, C, H // P, W // P)


def to_image(x: Tensor, num_patch: int) -> Tensor:
    """The inverse of ``to_patches``; keeps the layout."""
    BN, C, h, w = x.shape
    P = num_patch
    B = BN // (P * P)
    if _is_channels_last(x):
        x = x.permute(0, 2, 3, 1).reshape(B, P, P, h, w, C).transpose(2, 3)
        return x.reshape(B, P * h, P * w, C).permute(0, 3, 1, 2)
    x = x.reshape(B, P, P, C, h, w).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, C, P * h, P * w)


def _is_channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)
