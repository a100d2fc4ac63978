"""The stages of encoder and decoder, frozen: three convolutions, in floats or in int8."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import ops
from ..modules.unet import DoubleConv
from ..ops.patches import to_image
from .cells import CellConv
from .convolution import FoldedConv, ResizedConv, SplitConv, cast, fold
from .ends import Head, Stem
from .quantization import QuantizedConv, QuantParams, Range

NARROW = 32  # output channels up to which a convolution has a kernel of its own on a GPU
_SMALL = 8  # side of the maps up to which ``ResizedConv`` is faster, measured on AVX512


def _folded(block: DoubleConv) -> tuple[FoldedConv, FoldedConv, FoldedConv]:
    """The three convolutions of a block, in float32."""
    conv1, norm1, _ = block.conv1
    conv2, norm2, _, conv3, norm3 = block.conv2
    return fold(conv1, norm1), fold(conv2, norm2), fold(conv3, norm3)  # type: ignore[arg-type]


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
        image, half = num_patch is not None, dtype != torch.float32
        self.dtype, self.source = dtype, torch.float32 if image else dtype
        self.resizes = side is not None
        self.first: nn.Module = cast(first, self.source, layout, onednn)
        self.second: nn.Module = cast(second, dtype, layout, onednn)
        self.third: nn.Module = cast(third, dtype, layout, onednn)
        if onednn and half:
            if image:
                self.first = SplitConv(first, layout)
            elif side is not None and side <= _SMALL:
                self.first = ResizedConv(first, concat, side, layout)
        elif half:
            if num_patch is not None:
                self.first = Stem(first, num_patch, dtype, layout)
            elif side is not None and not concat:
                self.first = CellConv(first, self.first, dtype, side)
            if third.weight.shape[0] <= NARROW:
                self.second = CellConv(second, self.second, dtype)
                self.third = CellConv(third, self.third, dtype)

    @property
    def takes_head(self) -> bool:
        """Whether the head may be computed in the last convolution."""
        return isinstance(self.third, CellConv)

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        num_patch: int = 1,
        head: Head | None = None,
        images: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Maps, or their patches, and the skip to concatenate in front of their channels.

        A ``Stem`` takes images. With a head the result is the head's, for the images given.
        """
        a, b = self._inner(x, skip, num_patch)
        if head is None or images is None:
            return self.third(b, a)
        if isinstance(self.third, CellConv) and self.third.serves(b) and images.shape[1] == 1:
            return head.compare(self.third(b, a, head.conv), images)
        return head(self.third(b, a), images)

    def _inner(self, x: Tensor, skip: Tensor | None, num_patch: int) -> tuple[Tensor, Tensor]:
        """What the first and the second convolution make."""
        if isinstance(self.first, Stem):
            a = self.first(x)
        elif isinstance(self.first, ResizedConv | CellConv):  # these resize by themselves
            skip = None if skip is None else skip.to(self.source)
            a = self.first(to_image(x.to(self.source), num_patch), skip)
        else:
            x = x.to(self.source)
            x = ops.upsample_concat(x, skip, num_patch=num_patch) if self.resizes else x
            a = self.first(x).to(self.dtype)
        return a, self.second(a)


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
