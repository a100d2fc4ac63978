"""The in-painting block, frozen for evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels import dispatch
from ..modules import InpaintBlock
from ..modules.memory import _Memory
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


class SplitMemory(nn.Module):
    """A memory of float32 in products of bfloat16, as exact: see ``ops.window_lookup``.

    Args:
        memory: whose slots are copied; see ``fits``.
    """

    parts: Tensor  # [3, N, M, C]

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        assert self.fits(memory)
        self.memory = memory
        self.top_k = int(memory.shrink_thres)
        self.register_buffer("parts", ops.split(memory.slots, 3), persistent=False)

    @staticmethod
    def fits(memory: nn.Module) -> bool:
        """Whether every place has a memory of its own, with Gumbel shrinkage."""
        if not isinstance(memory, _Memory) or memory.single:
            return False
        return isinstance(memory.shrink_thres, int) and memory.shrink_thres > 0

    @property
    def slots(self) -> Tensor:
        return self.memory.slots

    def serves(self, maps: Tensor) -> bool:
        """Whether kernels look up these maps; if not, the memory itself does."""
        return dispatch.serves_window_lookup(maps, self.parts, self.top_k)

    def look_up(self, query: Tensor, values: Tensor | None = None) -> Tensor:
        """Answers [B, N, C] to such a query, or [B, N, V] with ``values`` [N, M, V]."""
        maps = query[:, None].permute(0, 3, 1, 2)  # a row of places, each of them a window
        if not self.serves(maps):
            return self.memory.look_up(query, values)
        values = self.slots if values is None else values
        return ops.window_lookup(maps, self.parts, self.top_k, (1, query.shape[1]), values)

    def forward(self, query: Tensor) -> Tensor:
        return self.look_up(query)


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


def split_products(block: nn.Module) -> None:
    """Let an ``InpaintBlock`` compute as ``SplitMemory`` and ``SplitLinear``, for a GPU.

    In float32, without matrix units, the linear layers take three quarters of its time. What their
    split leaves out is small beside the rounding of the next stage, before which no slot is chosen.
    That of the memory, which chooses slots, is as exact as float32.
    """
    if not isinstance(block, InpaintBlock):
        return
    if SplitMemory.fits(block.memory):
        block.memory = SplitMemory(block.memory)  # type: ignore[assignment]
    for i, layer in enumerate(block.ff):
        if isinstance(layer, nn.Linear):
            block.ff[i] = SplitLinear(layer.weight, layer.bias)
    if block.attention is not None:
        C, out = block.attention.embed_dim, block.attention.out_proj
        in_weight, in_bias = block.attention.in_proj_weight, block.attention.in_proj_bias
        block.query = SplitLinear(in_weight[:C], in_bias[:C])
        block.attention.out_proj = SplitLinear(out.weight, out.bias)  # type: ignore[assignment]
