"""How maps [B, C, H, W] may lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def turned(x: Tensor) -> Tensor:
    """Dense, but rows and columns lie in memory the other way round."""
    return x.mT.contiguous().mT


def strided(x: Tensor) -> Tensor:
    """Every second row and every third column of something larger, channels last."""
    B, C, H, W = x.shape
    larger = x.new_full((B, 2 * H, 3 * W, C), torch.nan).permute(0, 3, 1, 2)
    return larger[:, :, ::2, ::3].copy_(x)


def expanded(x: Tensor) -> Tensor:
    """One row's values for all, in the whole batch."""
    return x[:1, :, :1].expand(x.shape)


Layout = Callable[[Tensor], Tensor]
LAYOUTS: list[Layout] = [contiguous, channels_last, turned, strided, expanded]
