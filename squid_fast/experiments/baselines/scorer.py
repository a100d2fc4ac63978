"""A trained baseline on disk and at work: the same scorer and commands as for SQUID."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...inference.bundle import FORMAT, BundleError, read_json, save_weights
from ...inference.scorer import BaseScorer, Scorer, fingerprint
from ...inference.scores import Calibration, ScoreCalibration
from ...modules.images import check_tensor, check_values
from ...ops.common import as_floats
from ...utils.atomic import write_json
from ...utils.checkpoints import UnreadableError, read_tensors, tensors
from ...utils.devices import Backend, ScoringPrecision, choose_device, without_autocast
from ...utils.text import shown
from ...utils.tf32 import tf32
from .networks import AutoEncoder, MemAE, PixelInpainting
from .shallow import Mahalanobis, NearestNeighbours, PcaResidual, PixelMethod, Smoothness

METHODS: dict[str, tuple[type[PixelMethod] | type[AutoEncoder], str]] = {
    "pca": (PcaResidual, "residual of a principal component analysis of 32 x 32 pixels"),
    "mahalanobis": (Mahalanobis, "Mahalanobis distance on 32 x 32 pixels"),
    "knn": (NearestNeighbours, "distance to the nearest normal images on 32 x 32 pixels"),
    "smoothness": (Smoothness, "how little neighbouring pixels differ, of 32 x 32"),
    "autoencoder": (AutoEncoder, "reconstruction error of a plain auto-encoder"),
    "memae": (MemAE, "reconstruction error of an auto-encoder with a memory (MemAE)"),
    "pixel_inpainting": (PixelInpainting, "error of in-painting squares that are cut out"),
}
"""What SQUID is compared with: name to class and meaning of its score."""


class BaselineScorer(BaseScorer):
    """Scores images with a trained method of ``METHODS``, in float32 or float64.

    ``method`` is the trained module, which maps images of ``image_size`` pixels a side to scores
    and reconstructions. Without a calibration only ``raw_scores`` can be used.

    >>> method = PcaResidual(mean=torch.zeros(1024), components=torch.eye(2, 1024))
    >>> known = Calibration({"distance": ScoreCalibration(1.0, 0.5, 2.0, 0.05, [])}, [], [], "")
    >>> scorer = BaselineScorer("pca", method, 32, known, "cpu")
    >>> scorer.score(torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)).z_score
    tensor([61.9375])
    """

    batch_size = 32

    def __init__(
        self,
        name: str,
        method: nn.Module,
        image_size: int,
        calibration: Calibration | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        score, where = METHODS[name][0].score_name, choose_device(device)
        if where.type == "mps" and issubclass(METHODS[name][0], PixelMethod):
            raise ValueError(
                f"a {name} computes in float64, which {where} does not; the device 'cpu' would fit."
            )
        super().__init__(score, (score,), image_size, "float32", where, calibration)
        self.name, self.method = name, method.eval().to(where)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of method, weights and calibration."""
        weights = self.method.state_dict().items()
        return fingerprint(weights, vars(self.calibration_of()), self.name)

    @torch.inference_mode()
    def measure(
        self, images: Tensor, names: Collection[str], reconstruction: bool = True
    ) -> tuple[dict[str, Tensor], Tensor]:
        side = self.image_size
        check_tensor(images, bytes_fit=True)
        if images.dim() != 4 or tuple(images.shape[1:]) != (1, side, side):
            raise ValueError(
                f"images are {list(images.shape)}; this {self.name} takes [B, 1, {side}, {side}]."
            )
        if images.dtype != torch.uint8:
            check_values(images)
        images = as_floats(images.to(self.device))
        with tf32(False), without_autocast(self.device):
            raw, recon = self.method(images) if len(images) else (images.new_zeros(0), images)
        return {self.score_name: raw.cpu()}, recon


def save_baseline(scorer: BaselineScorer, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the folder that ``load_scorer`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT, "method": scorer.name, "network": getattr(scorer.method, "config", {}),
        "image_size": scorer.image_size, "about": dict(about),
    }  # fmt: skip
    save_weights(scorer.method.state_dict(), folder / "model.safetensors")
    write_json(config, folder / "config.json")
    write_json(vars(scorer.calibration_of()), folder / "calibration.json")


def load_scorer(
    folder: str | Path,
    score: str | None = None,
    precision: ScoringPrecision = "auto",
    device: str | torch.device | None = None,
    backend: Backend = "eager",
) -> Scorer | BaselineScorer:
    """The scorer of a folder that training wrote, of SQUID or of a baseline.

    Raises:
        BundleError: the folder is no bundle, or damaged.
        ValueError: a score, precision or backend that a baseline does not have.

    >>> from squid_fast import SQUID, Bundle, Discriminator, save_bundle
    >>> save_bundle(Bundle(SQUID.from_preset("small"), Discriminator(2)), "model")
    >>> scorer = load_scorer("model", device="cpu")
    >>> type(scorer).__name__, scorer.image_size
    ('Scorer', 48)
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = read_json(path) if os.path.isfile(path) else {}
    if "method" not in config:
        return Scorer.load(folder, score, precision, device, backend)
    try:
        name, side = config["method"], config["image_size"]
        kind = METHODS[name][0]
        state = tensors(read_tensors(folder / "model.safetensors"))
        method: nn.Module
        if issubclass(kind, PixelMethod):
            method = kind(**state)
        else:
            method = kind(**config["network"])
            method.load_state_dict(state)
        known = ScoreCalibration(**read_json(folder / "calibration.json"))
    except UnreadableError as error:
        where = shown(folder / "model.safetensors")
        raise BundleError(
            f"{shown(folder)} does not hold a trained method: of {where}, {error}."
        ) from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BundleError(f"{shown(folder)} does not hold a trained method: {error}") from error
    if score not in (None, kind.score_name):
        raise ValueError(f"score is {score!r}; a {name} has {kind.score_name!r} alone.")
    if precision not in ("auto", "float32"):
        raise ValueError(f"precision is {precision!r}; a {name} is scored in 'float32'.")
    if backend != "eager":
        raise ValueError(f"backend is {backend!r}; a {name} is scored by 'eager' alone.")
    calibration = Calibration({kind.score_name: known}, [], [], "")
    return BaselineScorer(name, method, side, calibration, device)
