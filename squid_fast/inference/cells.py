"""Convolutions of the stages at full resolution, by a kernel of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels import dispatch
from ..ops.convolution import cell_weights, resized_weights
from .convolution import FoldedConv


class CellConv(nn.Module):
    """``ReLU(conv(x) + residual)`` of 3 x 3 by ``ops.cell_convolution`` where its kernel serves.

    Elsewhere by the library, which on CPUs is everywhere: of oneDNN's convolutions behind a resize,
    only that of 64 to 32 channels and 64 x 64 pixels became faster in phases, by 8% for eight
    images in bf16, and slower by 15% for a single one.

    Args:
        conv: in float32.
        library: the same convolution, of maps of ``dtype``.
        side: of ``x``, where it is resized to twice the side in front of the convolution; None
            where it is not.
    """

    weights: Tensor
    bias: Tensor

    def __init__(
        self, conv: FoldedConv, library: nn.Module, dtype: torch.dtype, side: int | None = None
    ) -> None:
        super().__init__()
        self.library, self.resizes, self.step = (
            library,
            side is not None,
            (1, 1) if side else (1, 2),
        )
        weights = resized_weights(conv.weight, side, side) if side else cell_weights(conv.weight)
        # Not in the state dict, which has the library's.
        self.register_buffer("weights", weights.to(dtype), persistent=False)
        self.register_buffer("bias", conv.bias, persistent=False)

    def serves(self, x: Tensor) -> bool:
        """Whether maps like these are convolved by the kernel."""
        if self.resizes:
            return dispatch.serves_phases(x, self.weights)
        return dispatch.serves_narrow_convolution(x, self.weights)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, head: nn.Conv2d | None = None
    ) -> Tensor:
        """[B, Cin, h, w] to [B, Cout, ...]; with a head, its sigmoid in float32, [B, 1, ...].

        A head may be given where the kernel serves.
        """
        if not self.serves(x):
            return self.library(ops.upsample_concat(x) if self.resizes else x, residual)
        parts = None
        if head is not None:
            assert head.bias is not None
            parts = head.weight.flatten(), head.bias
        weights, bias = self.weights, self.bias
        return ops.cell_convolution(x, weights, bias, self.step, residual=residual, head=parts)
