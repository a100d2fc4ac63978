"""A trained model as a scorer: images in, calibrated anomaly scores out (paper section 3.4)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..data import ImageSet
from ..metrics import Evaluation, evaluate
from ..modules import SQUID, Discriminator, ScoreMode
from ..modules.squid import check_images
from ..modules.unet import to_patches
from ..utils.devices import ScoringPrecision, choose_device, choose_layout, has_fast_bf16, to_layout
from .bundle import load_bundle
from .convolution import fold_discriminator, has_onednn
from .graphs import Graphs
from .network import FrozenGenerator
from .precision import check_hardware, choose_scoring_precision
from .scores import PAPER_SCORE, SCORES, Calibration, ScoreCalibration

JUDGED: dict[str, tuple[Literal["reconstruction", "image"], ScoreMode]] = {
    PAPER_SCORE: ("reconstruction", "instance"),
    "discriminator_running": ("reconstruction", "running"),
    "discriminator_image": ("image", "instance"),
}
"""Scores that are the discriminator's: what it judges, and by which statistics."""

_BATCH = 256  # of a whole set
_CPU_BATCH = 8  # whose maps stay in the cache: a larger one goes through the network in parts


@dataclass(frozen=True)
class Scores:
    """Scores of a batch, float32 on the CPU.

    Attributes:
        raw: [B], in the unit of the score.
        z_score: [B], standard deviations from the mean of normal training images; greater is
            less normal. Rank by this one.
        anomaly_score: [B], sigmoid(z_score): 1 is anomalous. The paper's ``1 - sigmoid((s - mean)
            / std)``; in float32 it saturates and ties where z_score does not.
        reconstruction: [B, 1, H, W], where asked for.
    """

    raw: Tensor
    z_score: Tensor
    anomaly_score: Tensor
    reconstruction: Tensor | None = None


class Scorer:
    """Scores images with a trained generator and discriminator.

    Built once: both are copied into the form that evaluation runs fastest in (no teacher, batch
    norm folded into convolutions, memory slots projected), so that later changes of the modules
    do not reach the scorer. The score of an image does not depend on the images beside it.

    Args:
        model, discriminator: trained.
        calibration: as from ``calibrate``; without one only ``raw_scores`` can be used.
        score: one of ``SCORES``.
        precision: of the convolutions, everything else being float32. "float32"; "bf16"; "int8",
            in which those stages are in bytes that the calibration found to bear it (on CPUs with
            VNNI, for a calibration made on one), the others in bf16 where the hardware has it;
            "auto": on a CPU int8 where it ranks as float32 does (``AGREEMENT``), else bf16 where
            the hardware has it. Scores differ a little between precisions.
        device: "cpu", "cuda", ...; a GPU if there is one unless given.

    Raises:
        ValueError: no such score, precision or device; or the hardware does not compute in it.
    """

    def __init__(
        self,
        model: SQUID,
        discriminator: Discriminator,
        calibration: Calibration | None = None,
        score: str = PAPER_SCORE,
        precision: ScoringPrecision = "auto",
        device: str | torch.device | None = None,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score is {score!r}; it must be one of {', '.join(SCORES)}.")
        self.device = choose_device(device)
        self.calibration, self.score_name = calibration, score
        self.precision = choose_scoring_precision(precision, self.device, calibration, score)
        self.image_size = model.image_size
        self._config = model.config
        self._layout = choose_layout(model.config["features_root"])
        on_cpu = self.device.type == "cpu"
        wide = self.precision == "float32"
        if self.precision == "int8":  # what is not in bytes
            wide = not has_fast_bf16(self.device)
        self._generator = FrozenGenerator(
            model,
            torch.float32 if wide else torch.bfloat16,
            self._layout,
            onednn=on_cpu and has_onednn(),
            quantization=calibration.quantization
            if calibration and self.precision == "int8"
            else None,
            least=_CPU_BATCH if on_cpu and self.precision == "float32" else 1,
        ).to(self.device)
        judge = to_layout(copy.deepcopy(discriminator).float().eval().to(self.device), self._layout)
        self._discriminators = nn.ModuleDict(
            {"instance": judge, "running": fold_discriminator(judge)}
        )
        self._graphs = Graphs()
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        score: str | None = None,
        precision: ScoringPrecision = "auto",
        device: str | torch.device | None = None,
    ) -> Scorer:
        """The scorer of a bundle folder; its configured score unless another is named.

        Raises:
            BundleError: the folder is no bundle, or damaged.
            ValueError: as of the constructor.
        """
        check_hardware(precision, choose_device(device))
        loaded = load_bundle(bundle)
        return cls(
            loaded.model,
            loaded.discriminator,
            loaded.calibration,
            score or loaded.score,
            precision,
            device,
        )

    @property
    def threshold(self) -> float:
        """On the z-score: an image is flagged when its z-score exceeds it."""
        return self._calibrated().threshold

    @property
    def false_positive_rate(self) -> float:
        """Share of normal validation images at which ``threshold`` was set."""
        return self._calibrated().false_positive_rate

    @property
    def reference_z(self) -> list[float]:
        """z-scores of the normal images that gave the threshold."""
        return self._calibrated().reference_z

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, calibration, score and precision: rows of two must not be mixed."""
        digest = hashlib.sha256()
        for module in (self._generator, self._discriminators):
            for name, value in module.state_dict().items():
                digest.update(name.encode())
                digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        calibration = self.calibration and self.calibration.to_json()
        about = [self._config, calibration, self.score_name, self.precision]
        digest.update(json.dumps(about, sort_keys=True).encode())
        return digest.hexdigest()

    def score(self, images: Tensor, reconstruction: bool = False) -> Scores:
        """Scores of images [B, 1, H, W]: float in [0, 1], or uint8, of which 255 is 1.

        Raises:
            ValueError: images that the model cannot take, or no calibration.
        """
        self._calibrated()
        names = (self.score_name,)
        logits, errors, recon = self._look(images, names)
        values = self._derive(names, logits, errors)[self.score_name]
        z = self.z_score(self.score_name, values)
        return Scores(values, z, torch.sigmoid(z), recon.cpu() if reconstruction else None)

    def to_torch_export(self) -> ExportedProgram:
        """The scorer as a program of ATen operations alone, which runs without squid_fast.

        It takes images float32 [B, 1, H, W] in [0, 1] for any B from 1 on, and returns raw score,
        z-score and anomaly score, each [B], and the reconstruction [B, 1, H, W]. Images are not
        checked: NaN or infinite pixels give NaN.

        Raises:
            ValueError: no calibration, or a scorer that is not in float32 on the CPU.
        """
        from .export import to_torch_export  # which is made of this module

        return to_torch_export(self)

    def prefetch(self, images: Tensor) -> Tensor:
        """Start the way of images to a GPU while it works on others; give the result to ``score``.

        On a CPU the images themselves.
        """
        if self._copies is None:
            return images
        with torch.cuda.stream(self._copies):
            return images.pin_memory().to(self.device, non_blocking=True)

    def raw_scores(
        self, images: ImageSet, names: Collection[str] = tuple(SCORES)
    ) -> dict[str, Tensor]:
        """Raw values [n] of several scores at once; "patch_error" needs the calibration."""
        logits, errors = self._look_at_all(images, names)
        return self._derive(names, logits, errors)

    def evaluate(self, images: ImageSet) -> tuple[dict[str, Evaluation], dict[str, np.ndarray]]:
        """Figures of every score on labelled images, and the z-scores [n] they are made of.

        Raises:
            ValueError: images of unknown label or of one class only, or no calibration.
        """
        known = self.calibration.scores if self.calibration else SCORES
        raw = self.raw_scores(images, [name for name in SCORES if name in known])
        z = {name: self.z_score(name, values).numpy() for name, values in raw.items()}
        evaluations = {
            name: evaluate(
                images.labels.numpy(),
                values,
                score_name=name,
                threshold=self._calibrated(name).threshold,
                false_positive_rate=self._calibrated(name).false_positive_rate,
            )
            for name, values in z.items()
        }
        return evaluations, z

    def z_score(self, name: str, raw: Tensor) -> Tensor:
        """z-scores [B], float32, of raw values, oriented so that greater is less normal."""
        own = self._calibrated(name)
        return z_score(name, raw, own.mean, own.std)

    def _calibrated(self, name: str | None = None) -> ScoreCalibration:
        if self.calibration is None:
            raise ValueError(
                "this scorer has no calibration, so there are no z-scores and no threshold; "
                "`squid-fast convert --data` or squid_fast.inference.calibrate make one."
            )
        name = name or self.score_name
        if name not in self.calibration.scores:
            raise ValueError(
                f"the calibration of this bundle lacks {name!r}: it is older than that score and "
                f"has {', '.join(self.calibration.scores)}."
            )
        return self.calibration.scores[name]

    @torch.inference_mode()
    def _look(
        self, images: Tensor, names: Collection[str]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The discriminator's logits by score, patch errors [B, N], and the reconstruction."""
        judged = tuple(name for name in JUDGED if name in names)
        images = self._received(images)
        if not len(images):
            nothing = images.new_zeros(0)
            patches = images.new_zeros(0, self._config["num_patch"] ** 2).cpu()
            return dict.fromkeys(judged, nothing.cpu()), patches, images
        if self._copies is not None:
            recon, errors, *logits = self._graphs(partial(self._network, judged), judged, images)
        else:
            parts = [self._network(judged, part) for part in images.split(_CPU_BATCH)]
            recon, errors, *logits = (torch.cat(column) for column in zip(*parts, strict=True))
        return dict(zip(judged, (x.cpu() for x in logits), strict=True)), errors.cpu(), recon

    def _received(self, images: Tensor) -> Tensor:
        """The images on the device, float32, once they are known to fit."""
        if self._copies is not None and images.is_cuda:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copies)  # they may come from prefetch
            images.record_stream(current)
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            images = images.to(torch.float32).div_(255)
        check_images(images, self._config, self.image_size)
        return images.to(torch.float32)

    def _network(self, names: tuple[str, ...], images: Tensor) -> tuple[Tensor, ...]:
        """Reconstruction, patch errors [B, N], and logits [B] by name."""
        recon = self._generator(images)
        squared = to_patches((recon - images).square(), self._config["num_patch"])
        errors = squared.mean(dim=(1, 2, 3)).view(images.shape[0], -1)
        logits = []
        for what, mode in (JUDGED[name] for name in names):
            judge = self._discriminators[mode]
            assert isinstance(judge, Discriminator)
            logits.append(judge.score(recon if what == "reconstruction" else images, mode))
        return recon, errors, *logits

    def _look_at_all(
        self, images: ImageSet, names: Collection[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The same for a whole set, in batches, without the reconstructions."""
        parts = [
            self._look(images.batch(slice(start, start + _BATCH)), names)[:2]
            for start in range(0, len(images), _BATCH)
        ]
        logits = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
        return logits, torch.cat([part[1] for part in parts])

    def _derive(
        self, names: Collection[str], logits: dict[str, Tensor], errors: Tensor
    ) -> dict[str, Tensor]:
        """Raw scores by name, from the discriminator's logits and the patch errors [n, N]."""
        values = dict(logits)
        if "reconstruction_error" in names:
            values["reconstruction_error"] = errors.mean(dim=1)
        if "patch_error" in names:
            if self.calibration is None:
                raise ValueError("patch_error needs a calibration, but this scorer has none.")
            mean = torch.tensor(self.calibration.patch_mean)
            std = torch.tensor(self.calibration.patch_std)
            values["patch_error"] = ((errors - mean) / std).amax(dim=1)
        return {name: values[name] for name in names}


def z_score(name: str, raw: Tensor, mean: float, std: float) -> Tensor:
    """float32; subtracted in float64, since the deviation can be tiny beside the mean."""
    return (SCORES[name][0] * (raw.double() - mean) / std).float()
