"""Building blocks of encoder and decoders (paper section 3.1; widths as in the published code).

Every stage is a *residual double convolution*:

    a = ReLU(BN(conv3x3(x)))                     stride 2 when it goes down
    b = BN(conv3x3(ReLU(BN(conv3x3(a)))))
    out = ReLU(a + b)

The module names look arbitrary; they are those of the published checkpoints.
"""

import torch
from einops import rearrange
from torch import nn

from .upsample import upsample_concat


def to_patches(x: torch.Tensor, num_patch: int) -> torch.Tensor:
    """[B, C, H, W] -> [B*N, C, H/P, W/P], patches row-major, the patch index fastest."""
    return rearrange(x, "b c (i h) (j w) -> (b i j) c h w", i=num_patch, j=num_patch)


def to_image(x: torch.Tensor, num_patch: int) -> torch.Tensor:
    """The inverse of ``to_patches``."""
    return rearrange(x, "(b i j) c h w -> b c (i h) (j w)", i=num_patch, j=num_patch)


class DoubleConv(nn.Module):
    """The residual double convolution of the module text."""

    def __init__(self, in_ch: int, out_ch: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_ch, out_ch, 3, stride, 1), nn.BatchNorm2d(out_ch), nn.ReLU()
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(out_ch, out_ch, 3, 1, 1),
            nn.BatchNorm2d(out_ch),
            nn.ReLU(),
            nn.Conv2d(out_ch, out_ch, 3, 1, 1),
            nn.BatchNorm2d(out_ch),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.conv1(x)
        return torch.relu(a + self.conv2(a))


class In(nn.Module):
    """First stage: image channels to F."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.conv = DoubleConv(in_ch, out_ch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Down(nn.Module):
    """Next stage: half the resolution, more channels."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.mpconv = DoubleConv(in_ch, out_ch, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mpconv(x)


class Up(nn.Module):
    """Resize to the size of the skip, then convolve, with the skip ("concat") or without."""

    def __init__(self, in_ch: int, out_ch: int, op: str) -> None:
        super().__init__()
        self.op = op
        self.conv = DoubleConv(in_ch, out_ch)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.conv(upsample_concat(x, skip if self.op == "concat" else None))


class Out(nn.Module):
    """1x1 convolution and sigmoid: a map to an image in (0, 1)."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.conv(x))
