"""A trained pair frozen for evaluation: images in; logits, errors and reconstructions out."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageSet
from ..modules import SQUID, Discriminator, ScoreMode
from ..modules.images import check_tensor, check_values, refuse_values
from ..modules.squid import check_shape
from ..ops.common import as_floats
from ..utils.devices import Backend, choose_layout, has_fast_bf16, to_layout, without_autocast
from ..utils.tf32 import tf32
from .compiler import compiled
from .convolution import FoldedConv, cast, has_cudnn, has_onednn, use_cudnn
from .discriminator import FrozenDiscriminator
from .graphs import Function, Graphs, portions
from .inpainting import split_products
from .network import FrozenGenerator
from .scores import PAPER_SCORE, Quantization

LOGITS: dict[str, tuple[Literal["reconstruction", "image"], ScoreMode]] = {
    PAPER_SCORE: ("reconstruction", "instance"),
    "discriminator_running": ("reconstruction", "running"),
    "discriminator_image": ("image", "instance"),
}
"""Scores that are logits of the discriminator: its input, and the statistics that normalise it."""

BATCH = 256  # images of a set that are measured at once
_CPU_BATCH = 8  # whose maps stay in the cache: a larger one goes through the network in parts
_GPU_BATCH = 512  # captured at most: 1024 was 1% faster on an H200, and takes twice the memory
_MOST = 2**31 - 1  # values of a map that PyTorch resizes in channels-last


class Measurements(NamedTuple):
    """Logits [B] by names of ``LOGITS``, and mean squared errors of patches [B, N]; float32."""

    logits: dict[str, Tensor]
    patch_errors: Tensor


class FrozenModel(nn.Module):
    """A trained generator and discriminator, copied into the form that evaluation runs fastest in.

    Args:
        precision: of the convolutions, everything else being float32. In "int8" the stages that
            ``quantization`` names are quantized, the others in bf16 where the hardware has it.
        backend: "eager" or "compile", see ``Scorer``.
    """

    def __init__(
        self,
        model: SQUID,
        discriminator: Discriminator,
        precision: Literal["int8", "bf16", "float32"] = "float32",
        device: torch.device | str = "cpu",
        quantization: Quantization | None = None,
        backend: Backend = "eager",
    ) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.config, self.image_size = model.config, model.image_size
        self.value_range = model.value_range
        layout = choose_layout(model.config["features_root"])
        on_cpu, int8 = self.device.type == "cpu", precision == "int8"
        in_bf16 = precision == "bf16" or (int8 and has_fast_bf16(self.device))
        # On its way to the device, slots are projected anew: no setting of the caller may matter.
        with torch.device("cpu"), tf32(False), without_autocast(self.device):
            self.generator = FrozenGenerator(
                model,
                torch.bfloat16 if in_bf16 else torch.float32,
                layout,
                # A compiler knows nothing of these calls of oneDNN, and makes its own.
                onednn=on_cpu and has_onednn() and backend == "eager",
                quantization=quantization if int8 else None,
                least=_CPU_BATCH if on_cpu and precision == "float32" else 1,
            ).to(self.device)
        if not on_cpu and in_bf16:
            split_products(self.generator.inpaint)
        plain = to_layout(copy.deepcopy(discriminator).float().eval().to(self.device), layout)
        modes: tuple[ScoreMode, ...] = ("instance", "running")
        self.discriminators = nn.ModuleDict(
            {mode: FrozenDiscriminator(plain, mode, fused=not on_cpu) for mode in modes}
        )
        if has_cudnn(self.device):
            use_cudnn(self.generator)
        self.backend = backend
        self._begin()

    def _begin(self) -> None:
        """Make what belongs to a process, and no copy can share."""
        self._compiled = compiled(self._tabulate) if self.backend == "compile" else None
        self._graphs: Graphs | None = None
        self._copies: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            fits = _MOST // (2 * self.config["features_root"] * self.image_size**2)
            largest = min(_GPU_BATCH, 1 << max(fits, 1).bit_length() - 1)
            self._graphs = Graphs(self.device, largest)
            self._copies = torch.cuda.Stream(self.device)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_compiled", "_graphs", "_copies")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def forward(self, images: Tensor, names: Collection[str]) -> tuple[Tensor, ...]:
        """Reconstruction, patch errors [B, N], and the logits [B] of every name of ``LOGITS``.

        Images are floats in [0, 1] or bytes. Nothing is checked, so that it can be captured and
        traced; see ``measure``.
        """
        recon, errors = self.generator.reconstruct(images)
        logits = []
        for source, mode in (LOGITS[name] for name in names):
            shown = recon if source == "reconstruction" else as_floats(images)
            logits.append(self.discriminators[mode](shown))
        return recon, errors, *logits

    @torch.inference_mode()
    def measure(
        self, images: Tensor, names: Collection[str], reconstruction: bool = True
    ) -> tuple[Measurements, Tensor | None]:
        """Measurements for the scores named, and reconstructions [B, 1, H, W] on the device.

        Images [B, 1, H, W] are float in [0, 1], or uint8, of which 255 is 1. Those that the model
        cannot take raise ValueError. The discriminator runs for names of ``LOGITS`` alone. Without
        ``reconstruction`` there is None in place of the reconstructions.
        """
        names = tuple(name for name in LOGITS if name in names)
        images = self._received(images)
        on_gpu = self._graphs is not None
        # On a GPU the range is found on the way: asking beforehand would wait for the device.
        ranged = on_gpu and images.is_floating_point()
        width = len(names) + self.config["num_patch"] ** 2 + 2 * ranged
        table = torch.empty(
            len(images), width, dtype=torch.float32, device="cpu", pin_memory=on_gpu
        )
        recon = None
        if reconstruction:
            recon = torch.empty_like(images, dtype=torch.float32, device=self.device)
        function = partial(self._compiled or self._tabulate, names=names, ranged=ranged)
        with without_autocast(self.device):
            for rows, (shown, values) in self._in_portions(function, (names, ranged), images):
                table[rows].copy_(values, non_blocking=True)
                if recon is not None:
                    recon[rows].copy_(shown)
        if on_gpu:
            torch.cuda.current_stream(self.device).synchronize()
        if ranged:
            refuse_values(table[:, -2], table[:, -1], self.value_range)
        logits = {name: table[:, i].clone() for i, name in enumerate(names)}
        errors = table[:, len(names) : width - 2 * ranged].clone()
        return Measurements(logits, errors), recon

    def _tabulate(
        self, images: Tensor, names: tuple[str, ...], ranged: bool
    ) -> tuple[Tensor, Tensor]:
        """Reconstructions, and all else as one table, so that one copy brings it to the host.

        Its columns are the logits, the patch errors and, if ``ranged``, the smallest and the
        greatest value of each image.
        """
        recon, errors, *logits = self(images, names)
        columns = [*(x[:, None] for x in logits), errors]
        if ranged:
            columns += images.flatten(1).aminmax(dim=1, keepdim=True)  # NaN if any value is
        return recon, torch.cat([x.to(errors.dtype) for x in columns], dim=1)

    def _in_portions(
        self, function: Function, name: object, images: Tensor
    ) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """The function's results for portions of the images: their rows, and what it returns."""
        if self._graphs is not None:
            yield from self._graphs.replay(function, name, images)
            return
        for start in range(0, len(images), _CPU_BATCH):
            rows = slice(start, start + _CPU_BATCH)
            part = images[rows]
            if self._compiled is not None:  # for as few sizes as possible
                ((count, size),) = portions(len(part), _CPU_BATCH)
                part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, size - count))
            yield rows, tuple(result[: len(images[rows])] for result in function(part))

    def measure_set(self, images: ImageSet, names: Collection[str]) -> Measurements:
        """Measurements of a whole set, in batches."""
        parts = [self.measure(batch, names, False)[0] for batch in images.batches(BATCH)]
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
        yield from self.generator.state_dict().items()
        for mode, discriminator in self.discriminators.items():
            assert isinstance(discriminator, FrozenDiscriminator)
            yield from discriminator.plain.state_dict(prefix=f"{mode}.").items()

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
        own.generator.channels_last, own.generator.least = False, 1
        return to_layout(own, torch.contiguous_format)

    def _received(self, images: Tensor) -> Tensor:
        """The images in float32 or uint8, checked; for a GPU they may still be on the host."""
        check_tensor(images, self.value_range, bytes_fit=True)
        check_shape(images, self.config, self.image_size)
        if self._copies is not None and images.is_cuda:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copies)  # they may come from prefetch
            images.record_stream(current)
        if images.dtype != torch.uint8:
            if self._graphs is None:
                check_values(images, self.value_range)
            images = images.to(torch.float32)
        return images.to(self.device) if self._graphs is None else images
