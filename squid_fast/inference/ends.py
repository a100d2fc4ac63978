"""The two ends of the frozen network, where images are read: see ``ops.images``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..modules.unet import OutConv
from ..ops.images import patch_errors
from ..ops.patches import to_image
from ..utils.devices import named_layout
from .convolution import FoldedConv


class Stem(nn.Module):
    """The first convolution, straight from images: see ``ops.stem``."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self, conv: FoldedConv, num_patch: int, dtype: torch.dtype, layout: torch.memory_format
    ) -> None:
        super().__init__()
        # Channels lie side by side, as the kernel reads them.
        weight = conv.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", conv.bias)
        self.num_patch, self.dtype = num_patch, dtype
        self.channels_last = layout is torch.channels_last

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, Cin, H, W], floats in [0, 1] or bytes, to maps [B * N, F, H / P, W / P]."""
        maps = ops.stem(images, self.weight, self.bias, self.num_patch, self.dtype)
        return maps.contiguous(memory_format=named_layout(self.channels_last))


class Head(nn.Module):
    """The last convolution, and how far it is off: see ``ops.reconstruct``."""

    def __init__(self, out: OutConv, num_patch: int) -> None:
        super().__init__()
        self.conv, self.num_patch = out.conv, num_patch

    def forward(self, x: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions [B, Cin, H, W], and mean squared errors of patches [B, N]."""
        assert self.conv.bias is not None
        return ops.reconstruct(x, self.conv.weight, self.conv.bias, images, self.num_patch)

    def compare(self, recon: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same of reconstructions that the convolution in front has made, or their patches."""
        if recon.shape != images.shape:
            recon = to_image(recon, self.num_patch)
        return recon, patch_errors(recon, images, self.num_patch)
