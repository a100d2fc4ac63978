"""A trained generator frozen for evaluation: no teacher, norms folded, stages in int8."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..modules import SQUID, InpaintBlock
from ..modules.unet import DoubleConv, Down, OutConv, Up, to_image, to_patches
from ..ops.common import as_floats
from .convolution import FoldedConv, ResizedConv, SplitConv, cast, fold
from .quantization import QuantizedConv, QuantParams, Range
from .scores import Quantization

_SMALL = 8  # side of the maps up to which ``ResizedConv`` is faster, measured on AVX512


def _folded(block: DoubleConv) -> tuple[FoldedConv, FoldedConv, FoldedConv]:
    """The three convolutions of a block, in float32."""
    conv1, norm1, _ = block.conv1
    conv2, norm2, _, conv3, norm3 = block.conv2
    return fold(conv1, norm1), fold(conv2, norm2), fold(conv3, norm3)  # type: ignore[arg-type]


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
        self.num_patch, self.dtype, self.layout = num_patch, dtype, layout

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, Cin, H, W], floats in [0, 1] or bytes, to maps [B * N, F, H / P, W / P]."""
        maps = ops.stem(images, self.weight, self.bias, self.num_patch, self.dtype)
        return maps.contiguous(memory_format=self.layout)


class Head(nn.Module):
    """The last convolution, and how far it is off: see ``ops.reconstruct``."""

    def __init__(self, out: OutConv, num_patch: int) -> None:
        super().__init__()
        self.conv, self.num_patch = out.conv, num_patch

    def forward(self, x: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions [B, Cin, H, W], and mean squared errors of patches [B, N]."""
        assert self.conv.bias is not None
        return ops.reconstruct(x, self.conv.weight, self.conv.bias, images, self.num_patch)


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
        self.register_buffer("weight", ops.split_weight(weight.detach()))
        self.register_buffer("bias", bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., T] to [..., S]."""
        return ops.split_linear(x, self.weight, self.bias)


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


class Stage(nn.Module):
    """A residual double convolution in floats, in the decoder with the resize in front of it.

    Args:
        num_patch: P, of the first stage, whose input is images.
        side: of the decoder's maps before they are resized; None in the encoder.
        concat: channels of the skip that is concatenated in front of the maps, 0 for none.
    """

    def __init__(
        self,
        block: DoubleConv,
        dtype: torch.dtype,
        layout: torch.memory_format,
        onednn: bool,
        num_patch: int | None = None,
        side: int | None = None,
        concat: int = 0,
    ) -> None:
        super().__init__()
        first, second, third = _folded(block)
        image = num_patch is not None
        self.dtype, self.source = dtype, torch.float32 if image else dtype
        self.resizes = side is not None
        in_bf16 = onednn and dtype == torch.bfloat16
        self.first: nn.Module
        if in_bf16 and image:
            self.first = SplitConv(first, layout)
        elif num_patch is not None and dtype != torch.float32:
            self.first = Stem(first, num_patch, dtype, layout)
        elif in_bf16 and side is not None and side <= _SMALL:
            self.first = ResizedConv(first, concat, side, layout)
        else:
            self.first = cast(first, self.source, layout, onednn)
        self.second = cast(second, dtype, layout, onednn)
        self.third = cast(third, dtype, layout, onednn)

    def forward(self, x: Tensor, skip: Tensor | None = None, num_patch: int = 1) -> Tensor:
        """Maps, or their patches, and the skip to concatenate in front of their channels.

        A ``Stem`` takes images.
        """
        if isinstance(self.first, Stem):
            a = self.first(x)
            return self.third(self.second(a), residual=a)
        x = x.to(self.source)
        if isinstance(self.first, ResizedConv):
            a = self.first(to_image(x, num_patch), None if skip is None else skip.to(x.dtype))
        else:
            x = ops.upsample_concat(x, skip, num_patch=num_patch) if self.resizes else x
            a = self.first(x).to(self.dtype)
        return self.third(self.second(a), residual=a)


class QuantizedStage(nn.Module):
    """A residual double convolution in int8, in the decoder with the resize in front of it.

    Args:
        ranges: of the block's convolutions: "first", "second", "third", and "first.input".
        source: parameters of the input, where it is quantized already.
        target: float dtype of the output; None to quantize it by ``output``.
        skip: parameters of the skip, where it is quantized.
    """

    def __init__(
        self,
        block: DoubleConv,
        ranges: Mapping[str, Range],
        source: QuantParams | None,
        target: torch.dtype | None,
        resizes: bool = False,
        skip: QuantParams | None = None,
    ) -> None:
        super().__init__()
        self.source = source or QuantParams.from_range(*ranges["first.input"])
        self.a, b, self.output = (
            QuantParams.from_range(*ranges[part]) for part in ("first", "second", "third")
        )
        self.resizes, self.skip, self.target = resizes, skip, target
        first, second, third = _folded(block)
        self.first = QuantizedConv(first, self.source, self.a)
        self.second = QuantizedConv(second, self.a, b)
        self.third = QuantizedConv(third, b, target or self.output, self.a)

    def forward(self, x: Tensor, skip: Tensor | None = None, num_patch: int = 1) -> Tensor:
        """Maps, or their patches, and the skip to concatenate in front of their channels."""
        if skip is not None and self.skip is not None:
            skip = self.skip.dequantize(skip, x.dtype)
        x = ops.upsample_concat(x, skip, num_patch=num_patch) if self.resizes else x
        a = self.first(x if x.dtype == torch.uint8 else self.source.quantize(x))
        b = self.second(a)
        residual = a if self.target is None else self.a.dequantize(a, self.target)
        return self.third(b, residual=residual)


class FrozenGenerator(nn.Module):
    """Images to reconstructions, as a trained ``SQUID`` makes them in evaluation mode.

    The teacher is left out, batch norm folded into the convolutions, slots projected. Memories and
    in-painting stay in float32, whatever the convolutions compute in: which slots are the k best
    depends on small differences.

    Args:
        dtype: of the convolutions.
        quantization: the stages to compute in int8, with the ranges of their convolutions.
        least: memories and in-painting are given at least so many images, padded with zeros where
            there are fewer: libraries multiply matrices of few rows in another order, and the
            results would depend on the size of the batch.
    """

    def __init__(
        self,
        model: SQUID,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
        onednn: bool = False,
        quantization: Quantization | None = None,
        least: int = 1,
    ) -> None:
        super().__init__()
        self.least = least
        model = copy.deepcopy(model).float().eval()
        self.num_patch, self.level, self.layout = model.num_patch, model.level, layout
        self.combine = model.initial_combine or 0
        self.concat = [op == "concat" for op in model.config["ops"]]
        self.in_conv = Stage(model.in_conv.conv, dtype, layout, onednn, self.num_patch)
        downs = [down.mpconv for down in model.down_blocks if isinstance(down, Down)]
        ups = [up.conv for up in model.up_blocks if isinstance(up, Up)]
        self.downs = nn.ModuleList(Stage(block, dtype, layout, onednn) for block in downs)
        self.ups = nn.ModuleList()
        for i, block in enumerate(ups):
            deep = self.level - 1 - i
            side = model.image_size >> deep + 1
            if self.combine < deep + 1:
                side //= self.num_patch
            concat = model.config["features_root"] << deep if self.concat[i] else 0
            self.ups.append(Stage(block, dtype, layout, onednn, side=side, concat=concat))
        if quantization is not None:
            self._quantize(downs, ups, model.memory_blocks, dtype, quantization)
        self.inpaint = model.inpaint_block
        if isinstance(self.inpaint, InpaintBlock):
            for name in ("bottleneck_conv1", "bottleneck_conv2"):
                conv, norm, _ = getattr(self.inpaint, name)
                folded = cast(fold(conv, norm), torch.float32, layout, onednn)
                # oneDNN convolves, adds and activates in one call, which takes codes as channels.
                places = name == "bottleneck_conv2" and not onednn
                frozen = PlaceConv(folded, self.inpaint.code) if places else folded
                setattr(self.inpaint, name, frozen)
            self.inpaint.codes_folded = not onednn
            self.inpaint.freeze()
        self.memories = model.memory_blocks
        self.head = Head(model.out_conv, self.num_patch)
        self.requires_grad_(False)

    def _quantize(
        self,
        downs: list[DoubleConv],
        ups: list[DoubleConv],
        memories: nn.ModuleList,
        dtype: torch.dtype,
        chosen: Quantization,
    ) -> None:
        """Replace stages; maps between them stay quantized where all their readers are int8."""

        def ranges(name: str) -> dict[str, Range]:
            prefix = f"{name}."
            return {k[len(prefix) :]: v for k, v in chosen.ranges.items() if k.startswith(prefix)}

        L = self.level
        int8_downs = [f"downs.{i}" in chosen.stages for i in range(L)]
        int8_ups = [f"ups.{i}" in chosen.stages for i in range(L)]
        # Parameters of the input of every ``down``, which is a skip too; None where it is float.
        inputs: list[QuantParams | None] = [None] * L
        for i in (i for i in range(L) if int8_downs[i]):
            reader = L - 2 - i  # the ``up`` for which the output is the skip
            stays = i < L - 1 and int8_downs[i + 1]
            stays = stays and (int8_ups[reader] or not self.concat[reader])
            target = None if stays else torch.float32 if i == L - 1 else dtype
            stage = QuantizedStage(downs[i], ranges(f"downs.{i}"), inputs[i], target)
            if stays:
                inputs[i + 1] = stage.output
            self.downs[i] = stage
        for i in (i for i in range(L) if int8_ups[i]):
            deep = L - 1 - i
            target = dtype if isinstance(memories[deep], nn.Identity) else torch.float32
            self.ups[i] = QuantizedStage(
                ups[i], ranges(f"ups.{i}"), None, target, True, inputs[deep]
            )

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, Cin, H, W], floats in [0, 1] or bytes, to float32 of the same shape."""
        return self.reconstruct(images)[0]

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions, as from ``forward``, and mean squared errors of patches [B, N]."""
        x = images
        if not isinstance(self.in_conv.first, Stem):
            x = to_patches(as_floats(images), self.num_patch)
            x = x.contiguous(memory_format=self.layout)
        x = self.in_conv(x)
        skips: list[Tensor | None] = []
        for i, down in enumerate(self.downs):
            skip = None
            if self.concat[self.level - 1 - i]:
                skip = to_image(x, self.num_patch) if i < self.combine else x
            skips.append(skip)
            x = down(x)
        B = images.shape[0]
        x = self._padded(self.inpaint, x.float(), B)
        for i, up in enumerate(self.ups):
            deep = self.level - 1 - i
            patches = self.num_patch if self.combine == deep + 1 else 1
            x = up(x.contiguous(memory_format=self.layout), skips[deep], patches)
            if not isinstance(self.memories[deep], nn.Identity):
                x = self._padded(self.memories[deep], x.float(), B)
        return self.head(x, images)

    def _padded(self, module: nn.Module, x: Tensor, images: int) -> Tensor:
        """The module's output for the maps of so many images, computed for ``least`` at once."""
        missing = max(self.least - images, 0) * (x.shape[0] // images)
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x
        return module(padded)[: x.shape[0]]
