"""The in-painting block, frozen for evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..modules import InpaintBlock
from .convolution import FoldedConv, cast, fold


class PlaceConv(nn.Module):
    """``ReLU(conv(cat([z, code])))`` of 1 x 1: what the codes add is a bias of every place [N].

    Args:
        conv: of features and, behind their channels, codes.
        code: [N, bits].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: FoldedConv, code: Tensor) -> None:
        super().__init__()
        narrow = conv.weight.shape[1] - code.shape[1]
        self.register_buffer("weight", conv.weight[:, :narrow].clone())
        added = code.double() @ conv.weight[:, narrow:, 0, 0].double().T
        self.register_buffer("bias", (conv.bias + added).to(conv.bias.dtype))  # [N, width]

    def forward(self, z: Tensor) -> Tensor:
        """[B * N, width / 4, h, w] to [B * N, width, h, w], patch index fastest."""
        maps = F.conv2d(z, self.weight).unflatten(0, (-1, self.bias.shape[0]))
        return F.relu(maps + self.bias[:, :, None, None]).flatten(0, 1)


class SplitLinear(nn.Module):
    """A linear layer of float32 in products of bfloat16: see ``ops.split_linear``."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", ops.split(weight, 2))
        self.register_buffer("bias", bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., T] to [..., S]."""
        return ops.split_linear(x, self.weight, self.bias)


def freeze_inpainting(block: nn.Module, layout: torch.memory_format, onednn: bool) -> None:
    """Fold the norms of an ``InpaintBlock``, and project its slots; other modules stay as they are.

    What the codes of places add becomes a bias, but with oneDNN, which convolves, adds and
    activates in one call and takes codes as channels.
    """
    if not isinstance(block, InpaintBlock):
        return
    for name in ("bottleneck_conv1", "bottleneck_conv2"):
        conv, norm, _ = getattr(block, name)
        setattr(block, name, cast(fold(conv, norm), torch.float32, layout, onednn))
    if not onednn:
        block.bottleneck_conv2 = PlaceConv(block.bottleneck_conv2, block.code)  # type: ignore[assignment, arg-type]
        block.codes_folded = True
    block.freeze()


def split_linears(block: nn.Module) -> None:
    """Let an ``InpaintBlock`` compute its linear layers as ``SplitLinear``, for a GPU.

    In float32, without matrix units, they take three quarters of its time. What the split leaves
    out is small beside the rounding of the next stage, before which no slot is chosen.
    """
    if not isinstance(block, InpaintBlock):
        return
    for i, layer in enumerate(block.ff):
        if isinstance(layer, nn.Linear):
            block.ff[i] = SplitLinear(layer.weight, layer.bias)
    if block.attention is not None:
        C, out = block.attention.embed_dim, block.attention.out_proj
        in_weight, in_bias = block.attention.in_proj_weight, block.attention.in_proj_bias
        block.query = SplitLinear(in_weight[:C], in_bias[:C])
        block.attention.out_proj = SplitLinear(out.weight, out.bias)  # type: ignore[assignment]
