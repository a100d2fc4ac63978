"""A trained model as a scorer: images in, calibrated anomaly scores out (paper section 3.4)."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bundle import load_bundle
from .data import ImageSet
from .devices import Precision, choose_device, choose_layout, choose_precision, to_layout
from .evaluation import Evaluation, evaluate, threshold_at_false_positive_rate
from .modules import SQUID, Discriminator, ScoreMode
from .modules.unet import to_patches
from .scores import PAPER_SCORE, SCORES, Calibration, ScoreCalibration

_MODES: dict[str, ScoreMode] = {PAPER_SCORE: "instance", "discriminator_running": "running"}
_CALIBRATION_IMAGES = 2000  # of the training set; more do not move mean and deviation
_BATCH = 64


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

    The modules are moved to the device and used in evaluation mode; the teacher is not run.

    Args:
        model, discriminator: trained.
        calibration: as from ``calibrate``; without one only ``raw_scores`` can be used.
        score: one of ``SCORES``.
        precision: "float32", "bf16", or "auto": bf16 where the hardware computes in it. Scores of
            the two differ a little, so a calibration belongs to the precision it was made in.
        device: "cpu", "cuda", ...; a GPU if there is one unless given.

    Raises:
        ValueError: no such score, precision or device.
    """

    def __init__(
        self,
        model: SQUID,
        discriminator: Discriminator,
        calibration: Calibration | None = None,
        score: str = PAPER_SCORE,
        precision: Precision = "auto",
        device: str | torch.device | None = None,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score is {score!r}; it must be one of {', '.join(SCORES)}.")
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.calibration, self.score_name = calibration, score
        self.image_size = model.image_size
        self.model, self.discriminator = model.eval(), discriminator.eval()
        self._layout = choose_layout(model.config["features_root"])
        to_layout(self.model.to(self.device), self._layout)
        to_layout(self.discriminator.to(self.device), self._layout)
        self.model.inpaint_block.freeze()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        score: str | None = None,
        precision: Precision = "auto",
        device: str | torch.device | None = None,
    ) -> Scorer:
        """The scorer of a bundle folder; its configured score unless another is named."""
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

    def score(self, images: Tensor, reconstruction: bool = False) -> Scores:
        """Scores of images [B, 1, H, W] in [0, 1], float.

        Raises:
            ValueError: images that the model cannot take, or no calibration.
        """
        self._calibrated()
        names = [self.score_name]
        logits, errors, recon = self._look(images, names)
        values = self._derive(names, logits, errors)[self.score_name]
        z = self.z_score(self.score_name, values)
        return Scores(values, z, torch.sigmoid(z), recon.float().cpu() if reconstruction else None)

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
        raw = self.raw_scores(images)
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
        """z-scores of raw values, oriented so that greater is less normal."""
        calibration = self._calibrated(name)
        return _z_score(name, raw, calibration.mean, calibration.std)

    def _calibrated(self, name: str | None = None) -> ScoreCalibration:
        if self.calibration is None:
            raise ValueError(
                "this scorer has no calibration, so there are no z-scores and no threshold; "
                "`squid-fast convert --data` or squid_fast.inference.calibrate make one."
            )
        return self.calibration.scores[name or self.score_name]

    @torch.inference_mode()
    def _look(
        self, images: Tensor, names: Collection[str]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The discriminator's logits by score, patch errors [B, N], and the reconstruction."""
        images = images.to(self.device, memory_format=self._layout)
        with self._autocast():
            recon = self.model(images, teacher=False)["recon"]
            logits = {
                name: self.discriminator.score(recon, mode)
                for name, mode in _MODES.items()
                if name in names
            }
        squared = (recon.float() - images).square()
        errors = to_patches(squared, self.model.num_patch).mean(dim=(1, 2, 3))
        logits = {name: values.float().cpu() for name, values in logits.items()}
        return logits, errors.view(images.shape[0], -1).cpu(), recon

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

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _z_score(name: str, raw: Tensor, mean: float, std: float) -> Tensor:
    """float32; subtracted in float64, since the deviation can be tiny beside the mean."""
    return (SCORES[name][0] * (raw.double() - mean) / std).float()


def calibrate(
    model: SQUID,
    discriminator: Discriminator,
    normal_training: ImageSet,
    normal_validation: ImageSet | None = None,
    false_positive_rate: float = 0.05,
    precision: Precision = "auto",
    device: str | torch.device | None = None,
) -> Calibration:
    """Calibrate every score on normal images.

    Mean and deviation come from training images, as in the paper (up to 2,000, evenly chosen), the
    thresholds from validation images.

    Args:
        normal_training, normal_validation: normal images only; too few validation images for the
            rate and the training images give the thresholds instead.
        false_positive_rate: share of normal images that a threshold may flag, in (0, 1).

    Raises:
        ValueError: no training images, or a rate outside (0, 1).
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(
            f"the false-positive rate is {false_positive_rate}; it must lie in (0, 1)."
        )
    scorer = Scorer(model, discriminator, None, PAPER_SCORE, precision, device)
    every = max(1, len(normal_training) // _CALIBRATION_IMAGES)
    training = normal_training.subset(list(range(0, len(normal_training), every)))
    if len(training) < 2:
        raise ValueError(
            f"{len(training)} normal images cannot calibrate a score; give at least 2."
        )
    logits, errors = scorer._look_at_all(training, SCORES)
    patch_mean, patch_std = errors.mean(dim=0), errors.std(dim=0).clamp_min(1e-12)
    scorer.calibration = Calibration({}, patch_mean.tolist(), patch_std.tolist(), "")
    raw = held_out_raw = scorer._derive(SCORES, logits, errors)
    source = "training"
    if normal_validation is not None and len(normal_validation) * false_positive_rate >= 1:
        held_out_raw, source = scorer.raw_scores(normal_validation), "validation"
    scores = {}
    for name, values in raw.items():
        mean, std = values.double().mean().item(), max(values.double().std().item(), 1e-12)
        z = _z_score(name, held_out_raw[name], mean, std).numpy()
        threshold = threshold_at_false_positive_rate(z, false_positive_rate)
        scores[name] = ScoreCalibration(
            mean, std, threshold, false_positive_rate, np.sort(z).astype(float).round(4).tolist()
        )
    return Calibration(scores, patch_mean.tolist(), patch_std.tolist(), source)
