"""Convolutions for evaluation: batch norm folded in, ReLU and residual fused, weights packed."""

from __future__ import annotations

import copy
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm is no subclass of BatchNorm2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .. import ops
from ..modules import Discriminator


def has_onednn() -> bool:
    """Whether oneDNN's fused convolutions can be called; they are tried on x86 only."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    fused = hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    return x86 and fused and torch.backends.mkldnn.is_available()


class FoldedConv(nn.Module):
    """``ReLU(conv(x) + residual)``, with a batch norm folded into the weights [Cout, Cin, h, w]."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int]) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", bias.detach())
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, Cin, H, W] to [B, Cout, ...]; the residual, of that shape, may be overwritten."""
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return F.relu(x if residual is None else x + residual)


# Not among the operators of ``squid_fast.ops``: it has no CPU implementation.
@torch.library.custom_op("squid_fast_cudnn::convolution", mutates_args=())
def _cudnn_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """``ReLU(conv(x) + bias + residual)`` in one kernel, summed in float32 and rounded once."""
    where = stride, padding, [1, 1], 1
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *where)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *where)


@_cudnn_convolution.register_fake
def _(x, weight, bias, residual, stride, padding):  # type: ignore[no-untyped-def]
    # PyTorch's own two have no such description, and ``torch.compile`` would call them to find out.
    return F.conv2d(x, weight, bias, stride, padding)


class CudnnConv(FoldedConv):
    """The same in one call of cuDNN; see ``use_cudnn``.

    The bias has the dtype of the maps. cuDNN would take it in float32, but PyTorch finds the plan
    of an earlier call again by maps and weights alone, whatever its bias was.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _cudnn_convolution(x, self.weight, self.bias, residual, self.stride, self.padding)


def has_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's convolutions with an epilogue can be called: on NVIDIA's cards alone."""
    cudnn = torch.version.hip is None and torch.backends.cudnn.is_available()
    return device.type == "cuda" and cudnn


def use_cudnn(network: nn.Module) -> None:
    """Replace those convolutions of a network by ``CudnnConv`` that are faster so.

    That is where maps are in half precision and channels-last: on an H200 in bf16, scoring became
    1.37 times as fast, and its scores closer to float32, since PyTorch rounds sum, bias and
    residual one by one. Nothing is known of other dtypes and layouts, which stay as they are.
    ``python -m bench.gpu levers`` times both.

    Without a residual, PyTorch hands cuDNN the uninitialised output as one, with a factor of 0. If
    cuDNN read it, NaN in there could spread; a test on a GPU fills memory with NaN beforehand.
    """
    halves, layout = (torch.bfloat16, torch.float16), torch.channels_last
    for module in list(network.modules()):
        for name, conv in list(module.named_children()):
            if type(conv) is not FoldedConv or conv.weight.dtype not in halves:
                continue
            if conv.weight.is_contiguous(memory_format=layout):
                fused = CudnnConv(conv.weight, conv.bias, conv.stride, conv.padding)
                setattr(module, name, fused)


class PackedWeights(nn.Module):
    """A module with weights packed by oneDNN, in the layout that suits maps of a size.

    What is packed cannot be copied, so that a copy packs anew, for the same size: with another
    layout its results might differ in their last bits.
    """

    _packed: Tensor | None = None
    _size: list[int] | None = None  # of the first maps

    def packed(self, x: Tensor) -> Tensor:
        """The weights, packed at the first call for maps like these."""
        if self._packed is None:
            self._size = self._size or list(x.shape)
            self._packed = self.pack(self._size)
        return self._packed

    def pack(self, size: list[int]) -> Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class OneDnnConv(PackedWeights, FoldedConv):
    """The same in one call of oneDNN; without a residual the bias stays in float32."""

    def pack(self, size: list[int]) -> Tensor:
        where = self.padding, self.stride, [1, 1], 1
        return torch.ops.mkldnn._reorder_convolution_weight(self.weight, *where, size)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        where = self.padding, self.stride, [1, 1], 1
        packed = self.packed(x)
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, packed, self.bias, *where, "relu", [], ""
            )
        bias = self.bias.to(x.dtype)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, packed, bias, *where, "add", None, "relu", [], ""
        )


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> FoldedConv:
    """``ReLU(norm(conv(x)))`` in evaluation mode, as one convolution in float32."""
    folded = fuse_conv_bn_eval(conv, norm)
    assert folded.bias is not None
    padding = [int(side) for side in conv.padding]
    return FoldedConv(folded.weight.float(), folded.bias.float(), list(conv.stride), padding)


def fold_discriminator(discriminator: Discriminator) -> Discriminator:
    """A discriminator of the same score by running statistics, with its norms folded in."""
    folded = copy.deepcopy(discriminator)
    layers = folded.conv_model
    for i, layer in enumerate(layers):
        if isinstance(layer, _BatchNorm):
            layers[i - 1] = fuse_conv_bn_eval(layers[i - 1], layer)  # type: ignore[type-var]
            layers[i] = nn.Identity()
    return folded


def cast(
    conv: FoldedConv, dtype: torch.dtype, layout: torch.memory_format, onednn: bool
) -> FoldedConv:
    """The same convolution of maps of that dtype and layout."""
    weight = conv.weight.to(dtype, memory_format=layout)
    if onednn:
        return OneDnnConv(weight, conv.bias, conv.stride, conv.padding)
    return FoldedConv(weight, conv.bias.to(dtype), conv.stride, conv.padding)


class SplitConv(nn.Module):
    """A convolution of images that oneDNN does in bfloat16, nearly as exact as in float32.

    bfloat16 has no more bits than the pixels of an 8-bit image, and rounding them moves scores more
    than the rounding in all later layers. So images and weights are split into sums of two bfloat16
    numbers, laid out as channels: high * high + low * high + high * low. In float32, oneDNN takes
    ten times as long for a convolution of one channel.
    """

    def __init__(self, conv: FoldedConv, layout: torch.memory_format) -> None:
        super().__init__()
        high, low = ops.split(conv.weight, 2)
        weight = torch.cat([high, high, low], dim=1)
        wider = FoldedConv(weight, conv.bias, conv.stride, conv.padding)
        self.conv = cast(wider, torch.bfloat16, layout, onednn=True)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, Cin, H, W] to bfloat16 [B, Cout, ...]."""
        high, low = ops.split(images, 2)
        return self.conv(torch.cat([high, low, high], dim=1))


class ResizedConv(PackedWeights):
    """``FoldedConv(cat([skip, resize(x)]))``, bilinear to twice the side, with half the products.

    Both are linear, so the taps can be multiplied with before the map is resized, when it has a
    quarter of the pixels; what is left is one fixed matrix from pixels and taps to the pixels of
    the result, the same for all channels. It is small for small maps only. ``conv`` is 3 x 3,
    ``skip`` the channels of the skip, 0 for none, and ``side`` that of ``x``.
    """

    spread: Tensor

    def __init__(self, conv: FoldedConv, skip: int, side: int, layout: torch.memory_format) -> None:
        super().__init__()
        self.bias = conv.bias.bfloat16()
        part = conv.weight[:, skip:]
        taps = part.permute(2, 3, 0, 1).reshape(-1, part.shape[1])  # [(3, 3, Cout), Cin]
        self.taps = taps.bfloat16()
        ahead = FoldedConv(conv.weight[:, :skip], conv.bias, conv.stride, conv.padding)
        self.of_skip = cast(ahead, torch.bfloat16, layout, onednn=True) if skip else None
        # Each pixel by itself, resized, and what lies under each tap of each pixel of the result.
        pixels = torch.eye(side * side).view(-1, 1, side, side)
        wide = F.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False)
        spread = F.unfold(wide, 3, padding=1).permute(2, 0, 1).flatten(1)
        self.register_buffer("spread", spread.bfloat16())  # [4 * side**2, (side**2, 9)]

    def pack(self, size: list[int]) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.taps, size[0])

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """bfloat16 [B, Cin, h, w], [B, Cskip, 2h, 2w] to [B, Cout, 2h, 2w], channels-last."""
        B, C, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, C)
        tapped = torch.ops.mkldnn._linear_pointwise(rows, self.packed(rows), None, "none", [], "")
        result = torch.bmm(self.spread.expand(B, -1, -1), tapped.view(B, h * w * 9, -1))
        result = result.view(B, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)
        if skip is None or self.of_skip is None:
            return (result + self.bias[:, None, None]).relu_()
        return self.of_skip(skip, residual=result)
