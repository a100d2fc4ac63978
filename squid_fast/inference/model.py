"""A trained pair frozen for evaluation: images in; logits, errors and reconstructions out."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..data import ImageSet
from ..modules import SQUID, Discriminator, ScoreMode
from ..modules.squid import check_images
from ..ops.common import as_floats
from ..utils.devices import choose_layout, has_fast_bf16, to_layout
from .convolution import FoldedConv, cast, fold_discriminator, has_onednn
from .graphs import Graphs
from .network import FrozenGenerator, split_linears
from .scores import PAPER_SCORE, Quantization

LOGITS: dict[str, tuple[Literal["reconstruction", "image"], ScoreMode]] = {
    PAPER_SCORE: ("reconstruction", "instance"),
    "discriminator_running": ("reconstruction", "running"),
    "discriminator_image": ("image", "instance"),
}
"""Scores that are logits of the discriminator: its input, and the statistics that normalise it."""

BATCH = 256  # images of a set that are measured at once
_CPU_BATCH = 8  # whose maps stay in the cache: a larger one goes through the network in parts


class Measurements(NamedTuple):
    """Logits [B] by names of ``LOGITS``, and mean squared errors of patches [B, N]; float32."""

    logits: dict[str, Tensor]
    patch_errors: Tensor


class FrozenModel(nn.Module):
    """A trained generator and discriminator, copied into the form that evaluation runs fastest in.

    Args:
        precision: of the convolutions, everything else being float32. In "int8" the stages that
            ``quantization`` names are quantized, the others in bf16 where the hardware has it.
    """

    def __init__(
        self,
        model: SQUID,
        discriminator: Discriminator,
        precision: Literal["int8", "bf16", "float32"] = "float32",
        device: torch.device | str = "cpu",
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.config, self.image_size = model.config, model.image_size
        layout = choose_layout(model.config["features_root"])
        on_cpu, int8 = self.device.type == "cpu", precision == "int8"
        in_bf16 = precision == "bf16" or (int8 and has_fast_bf16(self.device))
        self.generator = FrozenGenerator(
            model,
            torch.bfloat16 if in_bf16 else torch.float32,
            layout,
            onednn=on_cpu and has_onednn(),
            quantization=quantization if int8 else None,
            least=_CPU_BATCH if on_cpu and precision == "float32" else 1,
        ).to(self.device)
        if not on_cpu and in_bf16:
            split_linears(self.generator.inpaint)
        plain = to_layout(copy.deepcopy(discriminator).float().eval().to(self.device), layout)
        folded = fold_discriminator(plain)
        self.discriminators = nn.ModuleDict({"instance": plain, "running": folded})
        self._graphs = Graphs()
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def forward(self, images: Tensor, names: Collection[str]) -> tuple[Tensor, ...]:
        """Reconstruction, patch errors [B, N], and the logits [B] of every name of ``LOGITS``.

        Images are floats in [0, 1] or bytes. Nothing is checked, so that it can be captured and
        traced; see ``measure``.
        """
        recon, errors = self.generator.reconstruct(images)
        logits = []
        for source, mode in (LOGITS[name] for name in names):
            discriminator = self.discriminators[mode]
            assert isinstance(discriminator, Discriminator)
            shown = recon if source == "reconstruction" else as_floats(images)
            logits.append(discriminator.score(shown, mode))
        return recon, errors, *logits

    @torch.inference_mode()
    def measure(self, images: Tensor, names: Collection[str]) -> tuple[Measurements, Tensor]:
        """Measurements for the scores named, and reconstructions [B, 1, H, W] on the device.

        Images [B, 1, H, W] are float in [0, 1], or uint8, of which 255 is 1. Those that the model
        cannot take raise ValueError. The discriminator runs for names of ``LOGITS`` alone.
        """
        names = tuple(name for name in LOGITS if name in names)
        images = self._received(images)
        if not len(images):
            logits = {name: images.new_zeros(0).cpu() for name in names}
            errors = images.new_zeros(0, self.config["num_patch"] ** 2).cpu()
            return Measurements(logits, errors), images
        if self._copies is not None:
            recon, errors, *found = self._graphs(partial(self, names=names), names, images)
        else:
            parts = [self(part, names) for part in images.split(_CPU_BATCH)]
            recon, errors, *found = (torch.cat(column) for column in zip(*parts, strict=True))
        logits = dict(zip(names, (x.cpu() for x in found), strict=True))
        return Measurements(logits, errors.cpu()), recon

    def measure_set(self, images: ImageSet, names: Collection[str]) -> Measurements:
        """Measurements of a whole set, in batches."""
        parts = [self.measure(batch, names)[0] for batch in images.batches(BATCH)]
        logits = {key: torch.cat([part.logits[key] for part in parts]) for key in parts[0].logits}
        return Measurements(logits, torch.cat([part.patch_errors for part in parts]))

    def prefetch(self, images: Tensor) -> Tensor:
        """Images for ``measure``, on their way to a GPU while it computes; on a CPU as they are."""
        if self._copies is None:
            return images
        with torch.cuda.stream(self._copies):
            return images.pin_memory().to(self.device, non_blocking=True)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors that the measurements depend on, with their names."""
        for module in (self.generator, self.discriminators):
            yield from module.state_dict().items()

    def portable(self) -> FrozenModel:
        """A copy of a float32 model on the CPU whose forward ``torch.export`` can trace.

        Its convolutions are PyTorch's own, in contiguous layout.
        """
        plain: dict[int, object] = {
            id(conv): cast(conv, torch.float32, torch.contiguous_format, onednn=False)
            for conv in self.generator.modules()
            if isinstance(conv, FoldedConv)
        }
        own = copy.deepcopy(self, plain).requires_grad_(False)
        own.generator.layout, own.generator.least = torch.contiguous_format, 1
        return to_layout(own, torch.contiguous_format)

    def _received(self, images: Tensor) -> Tensor:
        """The images on the device in float32, checked."""
        if self._copies is not None and images.is_cuda:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copies)  # they may come from prefetch
            images.record_stream(current)
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            images = images.to(torch.float32).div_(255)
        check_images(images, self.config, self.image_size)
        return images.to(torch.float32)
