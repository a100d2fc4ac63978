"""A trained generator frozen for evaluation: no teacher, norms folded, stages in int8."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import SQUID, InpaintBlock
from ..modules.unet import DoubleConv, Down, Up, to_image, to_patches
from .convolution import FoldedConv, ResizedConv, SplitConv, cast, fold
from .quantization import QuantizedConv, QuantParams, Range
from .scores import Quantization
from .windows import WindowMemory

_SMALL = 8  # side of the maps up to which ``ResizedConv`` is faster, measured on AVX512


def _folded(block: DoubleConv) -> tuple[FoldedConv, FoldedConv, FoldedConv]:
    """The three convolutions of a block, in float32."""
    conv1, norm1, _ = block.conv1
    conv2, norm2, _, conv3, norm3 = block.conv2
    return fold(conv1, norm1), fold(conv2, norm2), fold(conv3, norm3)  # type: ignore[arg-type]


def _resized(x: Tensor) -> Tensor:
    """To the size of the skip, which is twice the map's."""
    size = (2 * x.shape[2], 2 * x.shape[3])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Stage(nn.Module):
    """A residual double convolution in floats, in the decoder with the resize in front of it.

    Args:
        image: whether the input is images, in float32.
        side: of the decoder's maps before they are resized; None in the encoder.
        concat: channels of the skip that is concatenated in front of the maps, 0 for none.
    """

    def __init__(
        self,
        block: DoubleConv,
        dtype: torch.dtype,
        layout: torch.memory_format,
        onednn: bool,
        image: bool = False,
        side: int | None = None,
        concat: int = 0,
    ) -> None:
        super().__init__()
        first, second, third = _folded(block)
        self.dtype, self.source = dtype, torch.float32 if image else dtype
        self.resizes = side is not None
        in_bf16 = onednn and dtype == torch.bfloat16
        self.first: nn.Module
        if in_bf16 and image:
            self.first = SplitConv(first, layout)
        elif in_bf16 and side is not None and side <= _SMALL:
            self.first = ResizedConv(first, concat, side, layout)
        else:
            self.first = cast(first, self.source, layout, onednn)
        self.second = cast(second, dtype, layout, onednn)
        self.third = cast(third, dtype, layout, onednn)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Maps, and the skip to concatenate in front of their channels."""
        x = x.to(self.source)
        if skip is not None:
            skip = skip.to(self.source)
        if isinstance(self.first, ResizedConv):
            a = self.first(x, skip)
        else:
            x = _resized(x) if self.resizes else x
            a = self.first(x if skip is None else torch.cat([skip, x], dim=1)).to(self.dtype)
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

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Maps, and the skip to concatenate in front of their channels."""
        x = _resized(x) if self.resizes else x
        if skip is not None:
            skip = self.skip.dequantize(skip, x.dtype) if self.skip else skip.to(x.dtype)
            x = torch.cat([skip, x], dim=1)
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
        self.in_conv = Stage(model.in_conv.conv, dtype, layout, onednn, image=True)
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
                setattr(self.inpaint, name, cast(fold(conv, norm), torch.float32, layout, onednn))
            self.inpaint.freeze()
        self.memories = model.memory_blocks
        self.windows = nn.ModuleList()  # the same memories, for maps that stay in bf16 on a GPU
        for i, memory in enumerate(self.memories):
            split = dtype == torch.bfloat16 and not onednn and WindowMemory.fits(memory)
            width = model.config["features_root"] << i
            self.windows.append(WindowMemory(memory, width, dtype) if split else nn.Identity())
        self.head = model.out_conv
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
        """float32 [B, Cin, H, W] to float32 of the same shape, both in [0, 1]."""
        x = to_patches(images, self.num_patch).contiguous(memory_format=self.layout)
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
            if self.combine == deep + 1:
                x = to_image(x, self.num_patch)
            x = up(x.contiguous(memory_format=self.layout), skips[deep])
            if not isinstance(self.memories[deep], nn.Identity):
                x = self._answered(deep, x, B)
        if not self.combine:
            x = to_image(x, self.num_patch)
        return self.head(x.float())

    def _answered(self, deep: int, x: Tensor, images: int) -> Tensor:
        """The answers of the memory of a level to the maps of so many images."""
        windows = self.windows[deep]
        if isinstance(windows, WindowMemory) and windows.serves(x):
            return windows(x)
        return self._padded(self.memories[deep], x.float(), images)

    def _padded(self, module: nn.Module, x: Tensor, images: int) -> Tensor:
        """The module's output for the maps of so many images, computed for ``least`` at once."""
        missing = max(self.least - images, 0) * (x.shape[0] // images)
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x
        return module(padded)[: x.shape[0]]
