"""What an image can be scored by, and where each score lies on normal images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PAPER_SCORE = "discriminator_instance"

SCORES: dict[str, tuple[int, str]] = {
    PAPER_SCORE: (-1, "the paper's: the discriminator's logit of the reconstruction, every image "
                  "normalised by its own statistics"),
    "discriminator_running": (-1, "the same with the discriminator's running statistics"),
    "discriminator_image": (-1, "the discriminator's logit of the image itself, without a "
                            "reconstruction, normalised by its own statistics"),
    "reconstruction_error": (+1, "mean squared difference of image and reconstruction"),
    "patch_error": (+1, "the largest reconstruction error of a patch, each measured in standard "
                    "deviations of its place on normal training images"),
}  # fmt: skip
"""What an image can be scored by: (sign that makes greater mean less normal, meaning)."""


@dataclass(frozen=True)
class ScoreCalibration:
    """Where one score lies on normal images.

    Attributes:
        mean, std: of the raw score on normal training images.
        threshold: on the z-score; images above it are flagged.
        false_positive_rate: share of normal validation images that ``threshold`` flags at most.
        reference_z: z-scores of the normal images that gave the threshold, for the report.
    """

    mean: float
    std: float
    threshold: float
    false_positive_rate: float
    reference_z: list[float]


@dataclass(frozen=True)
class Quantization:
    """What scoring with 8-bit convolutions has to know of a model.

    Attributes:
        stages: of the network, those whose convolutions 8 bits are enough for.
        ranges: of every convolution's output, and of what it is given, on normal images:
            (low, high) by name.
        agreement: by score, the rank correlation of its values with those of float32 on normal
            images.
    """

    stages: list[str]
    ranges: dict[str, tuple[float, float]]
    agreement: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """Calibration of every score by its name.

    Attributes:
        scores: by name, see ``SCORES``.
        patch_mean, patch_std: reconstruction error of each patch [N] on normal training images.
        threshold_images: which normal images gave the thresholds: "validation" or, where there
            were too few, "training", which makes them optimistic.
        quantization: None where it was not made, as on processors without 8-bit products.
    """

    scores: dict[str, ScoreCalibration]
    patch_mean: list[float]
    patch_std: list[float]
    threshold_images: str
    quantization: Quantization | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        scores = {name: ScoreCalibration(**score) for name, score in values["scores"].items()}
        quantization = values.get("quantization")
        if quantization is not None:
            ranges = {name: (low, high) for name, (low, high) in quantization["ranges"].items()}
            quantization = Quantization(**{**quantization, "ranges": ranges})
        return cls(**{**values, "scores": scores, "quantization": quantization})
