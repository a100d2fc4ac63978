"""A trained generator frozen for evaluation: no teacher, norms folded, stages in int8."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import SQUID
from ..modules.unet import DoubleConv, Down, Up
from ..ops.common import as_floats
from ..ops.patches import to_image, to_patches
from ..utils.devices import named_layout
from .ends import Head, Stem
from .inpainting import freeze_inpainting
from .quantization import QuantParams, Range
from .scores import Quantization
from .stages import QuantizedStage, Stage
from .windows import WindowMemory


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
        self.num_patch, self.level = model.num_patch, model.level
        self.channels_last = layout is torch.channels_last
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
        freeze_inpainting(self.inpaint, layout, onednn)
        self.memories = model.memory_blocks
        if dtype == torch.bfloat16 and not onednn:
            for i, memory in enumerate(self.memories):
                if WindowMemory.fits(memory):
                    width = model.config["features_root"] << i
                    self.memories[i] = WindowMemory(memory, width, dtype)
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
            x = x.contiguous(memory_format=named_layout(self.channels_last))
        x = self.in_conv(x)
        skips: list[Tensor | None] = []
        for i, down in enumerate(self.downs):
            skip = None
            if self.concat[self.level - 1 - i]:
                skip = to_image(x, self.num_patch) if i < self.combine else x
            skips.append(skip)
            x = down(x)
        B, layout = images.shape[0], named_layout(self.channels_last)
        x = self._padded(self.inpaint, x.float(), B)
        for i, up in enumerate(self.ups):
            deep = self.level - 1 - i
            patches = self.num_patch if self.combine == deep + 1 else 1
            x = x.contiguous(memory_format=layout)
            plain = isinstance(self.memories[deep], nn.Identity)
            if not deep and plain and isinstance(up, Stage) and up.takes_head:
                return up(x, skips[deep], patches, self.head, images)
            x = up(x, skips[deep], patches)
            if isinstance(self.memories[deep], WindowMemory):
                x = self.memories[deep](x)
            elif not plain:
                x = self._padded(self.memories[deep], x.float(), B)
        return self.head(x, images)

    def _padded(self, module: nn.Module, x: Tensor, images: int) -> Tensor:
        """The module's output for the maps of so many images, computed for ``least`` at once."""
        missing = max(self.least - images, 0) * (x.shape[0] // images)
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x
        return module(padded)[: x.shape[0]]
