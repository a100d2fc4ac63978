"""A trained method of comparison on disk, and at work: the same verbs as for SQUID."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...data import ImageSet
from ...inference import Scorer, Scores
from ...inference.bundle import FORMAT, BundleError, read_json, save_weights
from ...inference.scores import ScoreCalibration
from ...metrics import Evaluation, evaluate, threshold_at_false_positive_rate
from ...utils.atomic import write_json
from ...utils.devices import ScoringPrecision, choose_device
from .networks import AutoEncoder, MemAE, PixelInpainting
from .shallow import Mahalanobis, NearestNeighbours, PcaResidual, PixelMethod, Smoothness

METHODS: dict[str, tuple[type[PixelMethod] | type[AutoEncoder], str]] = {
    "pca": (PcaResidual, "residual of a principal component analysis of 32 x 32 pixels"),
    "mahalanobis": (Mahalanobis, "Mahalanobis distance on 32 x 32 pixels"),
    "knn": (NearestNeighbours, "distance to the nearest normal images on 32 x 32 pixels"),
    "smoothness": (Smoothness, "how little neighbouring pixels differ, of 32 x 32"),
    "autoencoder": (AutoEncoder, "reconstruction error of a plain auto-encoder"),
    "memae": (MemAE, "reconstruction error of an auto-encoder with a memory (MemAE)"),
    "pixel_inpainting": (PixelInpainting, "error of painting squares that are cut out"),
}
"""What SQUID is compared with: name to class and meaning of its score."""

_BATCH = 32
Method = PixelMethod | AutoEncoder


class ComparisonScorer:
    """Scores images with a method of ``METHODS``, in float32 or better.

    Args:
        name: of the method.
        method: trained.
        image_size: S.
        calibration: of its score; without one only ``raw_scores`` can be used.
        device: "cpu", "cuda", ...; a GPU if there is one unless given.
    """

    precision = "float32"

    def __init__(
        self,
        name: str,
        method: nn.Module,
        image_size: int,
        calibration: ScoreCalibration | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.name, self.image_size, self.calibration = name, image_size, calibration
        self.device = choose_device(device)
        self._method = method.eval().to(self.device)
        self.score_name = METHODS[name][0].score_name

    @property
    def threshold(self) -> float:
        return self._calibrated().threshold

    @property
    def false_positive_rate(self) -> float:
        return self._calibrated().false_positive_rate

    @property
    def reference_z(self) -> list[float]:
        return self._calibrated().reference_z

    @cached_property
    def fingerprint(self) -> str:
        """Hash of method, weights and calibration."""
        digest = hashlib.sha256(self.name.encode())
        for key, value in self._method.state_dict().items():
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        digest.update(json.dumps(vars(self._calibrated()), sort_keys=True).encode())
        return digest.hexdigest()

    def prefetch(self, images: Tensor) -> Tensor:
        return images

    def score(self, images: Tensor, reconstruction: bool = False) -> Scores:
        """Scores of images [B, 1, S, S]: float in [0, 1], or uint8, of which 255 is 1.

        Raises:
            ValueError: images of another size, or no calibration.
        """
        self._calibrated()
        raw, recon = self._look(images)
        z = self.z_score(self.score_name, raw)
        return Scores(raw, z, torch.sigmoid(z), recon if reconstruction else None)

    def raw_scores(self, images: ImageSet) -> Tensor:
        """[n], float64, greater for the less normal."""
        parts = [
            self._look(images.batch(slice(start, start + _BATCH)))[0]
            for start in range(0, len(images), _BATCH)
        ]
        return torch.cat(parts)

    def evaluate(self, images: ImageSet) -> tuple[dict[str, Evaluation], dict[str, np.ndarray]]:
        """Figures of the score on labelled images, and the z-scores [n]; as of ``Scorer``."""
        z = self.z_score(self.score_name, self.raw_scores(images)).numpy()
        own = self._calibrated()
        found = evaluate(
            images.labels.numpy(),
            z,
            score_name=self.score_name,
            threshold=own.threshold,
            false_positive_rate=own.false_positive_rate,
        )
        return {self.score_name: found}, {self.score_name: z}

    def z_score(self, name: str, raw: Tensor) -> Tensor:
        """float32 [B]: standard deviations from the mean of normal training images."""
        own = self._calibrated()
        return ((raw.double() - own.mean) / own.std).float()

    def _calibrated(self) -> ScoreCalibration:
        if self.calibration is None:
            raise ValueError(f"this {self.name} has no calibration, so there are no z-scores.")
        return self.calibration

    @torch.inference_mode()
    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        side = self.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (1, side, side):
            raise ValueError(
                f"images are {list(images.shape)}; this {self.name} takes [B, 1, {side}, {side}]."
            )
        images = images.to(self.device)
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if not len(images):
            return images.new_zeros(0).cpu(), images.cpu()
        raw, recon = self._method(images)
        return raw.cpu(), recon.cpu()


def calibrated(
    scorer: ComparisonScorer, training: ImageSet, held_out: ImageSet | None, rate: float
) -> ScoreCalibration:
    """Mean and deviation on normal training images, threshold on held-out normal ones.

    Where these are too few for the rate, the training images give the threshold too.
    """
    raw = scorer.raw_scores(training).double()
    mean, std = raw.mean().item(), max(raw.std().item(), 1e-12)
    if held_out is not None and len(held_out) * rate >= 1:
        raw = scorer.raw_scores(held_out).double()
    z = np.sort(((raw - mean) / std).float().numpy())
    threshold = threshold_at_false_positive_rate(z, rate)
    return ScoreCalibration(mean, std, threshold, rate, z.astype(float).round(4).tolist())


def save_comparison(scorer: ComparisonScorer, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the folder that ``load_scorer`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    network = getattr(scorer._method, "config", {})
    config = {
        "format": FORMAT,
        "method": scorer.name,
        "network": network,
        "image_size": scorer.image_size,
        "about": dict(about),
    }
    save_weights(scorer._method.state_dict(), folder / "model.safetensors")
    write_json(config, folder / "config.json")
    write_json(vars(scorer._calibrated()), folder / "calibration.json")


def load_scorer(
    folder: str | Path,
    score: str | None = None,
    precision: ScoringPrecision = "auto",
    device: str | torch.device | None = None,
) -> Scorer | ComparisonScorer:
    """The scorer of a bundle folder: SQUID's, or that of a method of comparison.

    Raises:
        BundleError: the folder is no bundle, or damaged.
        ValueError: a score or precision that a method of comparison does not have.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or "method" not in read_json(folder / "config.json"):
        return Scorer.load(folder, score, precision, device)
    config = read_json(folder / "config.json")
    try:
        name, side = config["method"], config["image_size"]
        kind = METHODS[name][0]
        state = load_file(folder / "model.safetensors")
        method: nn.Module
        if issubclass(kind, PixelMethod):
            method = kind(**state)
        else:
            method = kind(**config["network"])
            method.load_state_dict(state)
        known = ScoreCalibration(**read_json(folder / "calibration.json"))
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise BundleError(f"{folder} does not hold a trained method: {error}") from error
    if score not in (None, kind.score_name):
        raise ValueError(f"score is {score!r}; a {name} has {kind.score_name!r} alone.")
    if precision not in ("auto", "float32"):
        raise ValueError(f"precision is {precision!r}; a {name} is scored in 'float32'.")
    return ComparisonScorer(name, method, side, known, device)
