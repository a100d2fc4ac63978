"""A trained generator as evaluation needs it: no teacher, nothing left to learn or to decide."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import SQUID, InpaintBlock
from ..modules.unet import DoubleConv, Down, Up, to_image, to_patches
from .convolution import FoldedConv, ResizedConv, SplitConv, cast, fold
from .quantization import Grid, QuantizedConv, Range
from .scores import Quantization

_SMALL = 8  # side of the maps up to which ``ResizedConv`` is faster, measured on AVX512


def _folded(block: DoubleConv) -> tuple[FoldedConv, FoldedConv, FoldedConv]:
    """The three convolutions of a block, in float32."""
    first, second, third = (
        (block.conv1[0], block.conv1[1]),
        (block.conv2[0], block.conv2[1]),
        (block.conv2[3], block.conv2[4]),
    )
    return fold(*first), fold(*second), fold(*third)  # type: ignore[arg-type]


def _resized(x: Tensor) -> Tensor:
    """To the size of the skip, which is twice the map's."""
    size = (2 * x.shape[2], 2 * x.shape[3])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Stage(nn.Module):
    """A residual double convolution in floats; of the decoder, with the resize in front of it.

    Args:
        block: trained.
        dtype: of the maps.
        image: whether it is given images, in float32.
        side: of the maps, in the decoder, before they are resized; None in the encoder.
        concat: channels of the skip that is put in front of them, 0 for none.
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
        """Maps, and those to put in front of their channels."""
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
    """A residual double convolution in bytes; of the decoder, with the resize in front of it.

    Args:
        block: trained.
        ranges: of its convolutions: "first", "second", "third", and "first.input".
        source: grid of the maps it is given, where they are bytes.
        resizes: the maps, as in the decoder.
        skip: grid of what is put in front of them, where it is bytes.
        target: float dtype of the output; None for bytes on the grid ``output``.
    """

    def __init__(
        self,
        block: DoubleConv,
        ranges: Mapping[str, Range],
        source: Grid | None,
        target: torch.dtype | None,
        resizes: bool = False,
        skip: Grid | None = None,
    ) -> None:
        super().__init__()
        self.source = source or Grid.over(ranges["first.input"])
        self.a, b, self.output = (Grid.over(ranges[part]) for part in ("first", "second", "third"))
        self.resizes, self.skip, self.target = resizes, skip, target
        first, second, third = _folded(block)
        self.first = QuantizedConv(first, self.source, self.a)
        self.second = QuantizedConv(second, self.a, b)
        self.third = QuantizedConv(third, b, target or self.output, self.a)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Maps, and those to put in front of their channels."""
        x = _resized(x) if self.resizes else x
        if skip is not None:
            skip = self.skip.decode(skip, x.dtype) if self.skip else skip.to(x.dtype)
            x = torch.cat([skip, x], dim=1)
        a = self.first(x if x.dtype == torch.uint8 else self.source.encode(x))
        b = self.second(a)
        return self.third(b, residual=a if self.target is None else self.a.decode(a, self.target))


class FrozenGenerator(nn.Module):
    """Images to reconstructions, as a trained ``SQUID`` makes them in evaluation mode.

    Everything that can be done once is done here: the teacher is left out, batch norm folded into
    the convolutions, slots projected. Memories and in-painting stay in float32, whatever the
    convolutions compute in: which slots are the k best hangs on small differences.

    Args:
        model: trained; it is not changed.
        dtype: of the convolutions.
        layout: of the maps.
        onednn: whether to call oneDNN's fused convolutions.
        quantization: names the stages to put in bytes.
        least: memories and in-painting are given no fewer images than these, made up of zeros
            where need be: libraries multiply matrices of few rows in another order, and the
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
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        downs = [down.mpconv for down in model.down_blocks if isinstance(down, Down)]
        ups = [up.conv for up in model.up_blocks if isinstance(up, Up)]
        self.downs.extend(Stage(block, dtype, layout, onednn) for block in downs)
        for i, block in enumerate(ups):
            deep = self.level - 1 - i
            side = model.image_size >> deep + 1
            if self.combine < deep + 1:
                side //= self.num_patch
            width = model.config["features_root"] << deep  # of the skip
            concat = width if self.concat[i] else 0
            self.ups.append(Stage(block, dtype, layout, onednn, side=side, concat=concat))
        if quantization is not None:
            self._put_in_bytes(downs, ups, model.memory_blocks, dtype, quantization)
        self.inpaint = model.inpaint_block
        if isinstance(self.inpaint, InpaintBlock):
            for name in ("bottleneck_conv1", "bottleneck_conv2"):
                conv, norm, _ = getattr(self.inpaint, name)
                setattr(self.inpaint, name, cast(fold(conv, norm), torch.float32, layout, onednn))
            self.inpaint.freeze()
        self.memories = model.memory_blocks
        self.head = model.out_conv
        self.requires_grad_(False)

    def _put_in_bytes(
        self,
        downs: list[DoubleConv],
        ups: list[DoubleConv],
        memories: nn.ModuleList,
        dtype: torch.dtype,
        chosen: Quantization,
    ) -> None:
        """Exchange stages; maps travel as bytes where all stages that read them are in bytes."""

        def ranges(name: str) -> dict[str, Range]:
            prefix = f"{name}."
            return {k[len(prefix) :]: v for k, v in chosen.ranges.items() if k.startswith(prefix)}

        L = self.level
        down_in_bytes = [f"downs.{i}" in chosen.stages for i in range(L)]
        up_in_bytes = [f"ups.{i}" in chosen.stages for i in range(L)]
        # Grids of the maps in front of every ``down``, which are the skips too; None for floats.
        grids: list[Grid | None] = [None] * L
        for i in (i for i in range(L) if down_in_bytes[i]):
            reader = L - 2 - i  # the ``up`` for which the output is the skip
            travels = i < L - 1 and down_in_bytes[i + 1]
            travels = travels and (up_in_bytes[reader] or not self.concat[reader])
            target = None if travels else torch.float32 if i == L - 1 else dtype
            stage = QuantizedStage(downs[i], ranges(f"downs.{i}"), grids[i], target)
            if travels:
                grids[i + 1] = stage.output
            self.downs[i] = stage
        for i in (i for i in range(L) if up_in_bytes[i]):
            deep = L - 1 - i
            target = dtype if isinstance(memories[deep], nn.Identity) else torch.float32
            self.ups[i] = QuantizedStage(
                ups[i], ranges(f"ups.{i}"), None, target, True, grids[deep]
            )

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, Cin, H, W] in [0, 1] to float32 [B, Cin, H, W]."""
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
        x = self._among_others(self.inpaint, x.float(), B)
        for i, up in enumerate(self.ups):
            deep = self.level - 1 - i
            if self.combine == deep + 1:
                x = to_image(x, self.num_patch)
            x = up(x.contiguous(memory_format=self.layout), skips[deep])
            if not isinstance(self.memories[deep], nn.Identity):
                x = self._among_others(self.memories[deep], x.float(), B)
        if not self.combine:
            x = to_image(x, self.num_patch)
        return self.head(x.float())

    def _among_others(self, module: nn.Module, x: Tensor, images: int) -> Tensor:
        """The module's answer for maps of so many images, asked for ``least`` at once."""
        missing = max(self.least - images, 0) * (x.shape[0] // images)
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x
        return module(padded)[: x.shape[0]]
