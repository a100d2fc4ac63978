"""Encoder and decoder (paper section 3.1), named as in published checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .norm import NormSequential


class DoubleConv(nn.Module):
    """``a = ReLU(BN(conv(x)))``, ``b = BN(conv(ReLU(BN(conv(a)))))``, ``ReLU(a + b)``; 3x3."""

    def __init__(self, in_ch: int, out_ch: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = NormSequential(
            nn.Conv2d(in_ch, out_ch, 3, stride, 1), nn.BatchNorm2d(out_ch), nn.ReLU(inplace=True)
        )
        self.conv2 = NormSequential(
            nn.Conv2d(out_ch, out_ch, 3, 1, 1),
            nn.BatchNorm2d(out_ch),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_ch, out_ch, 3, 1, 1),
            nn.BatchNorm2d(out_ch),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv1(x)
        return self.conv2(a, residual=a)


class InConv(nn.Module):
    """First stage: image channels to F."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.conv = DoubleConv(in_ch, out_ch)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Down(nn.Module):
    """Next stage: half the resolution, more channels."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.mpconv = DoubleConv(in_ch, out_ch, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mpconv(x)


class Up(nn.Module):
    """Bilinear resize to the size of the skip, twice the side, then a double convolution.

    With ``op`` "concat" the skip's channels come first, with "none" it is not used.
    """

    def __init__(self, in_ch: int, out_ch: int, op: str) -> None:
        super().__init__()
        self.op = op
        self.conv = DoubleConv(in_ch, out_ch)

    def forward(self, x: Tensor, skip: Tensor, num_patch: int = 1) -> Tensor:
        """Maps, or the patches of which ``num_patch`` a side make up the maps."""
        ahead = skip if self.op == "concat" else None
        return self.conv(ops.upsample_concat(x, ahead, num_patch=num_patch))


class OutConv(nn.Module):
    """1x1 convolution and sigmoid."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(x))
