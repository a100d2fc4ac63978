"""What an image can be scored by, and the distribution of each score on normal images."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

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
    """The distribution of one score on normal images.

    Attributes:
        mean, std: of the raw score on normal training images.
        threshold: on the z-score; images above it are flagged.
        false_positive_rate: largest share of normal validation images that ``threshold`` flags.
        reference_z: z-scores of the normal images that gave the threshold, for the report.
    """

    mean: float
    std: float
    threshold: float
    false_positive_rate: float
    reference_z: list[float]


@dataclass(frozen=True)
class Quantization:
    """What scoring in int8 has to know of a model.

    Attributes:
        stages: of the network, those that are computed in int8.
        ranges: (low, high) of every convolution's output by its name, and of its input by
            ``name.input``, on normal images.
        agreement: by score, the rank correlation of int8 and float32 on normal images.
    """

    stages: list[str]
    ranges: dict[str, tuple[float, float]]
    agreement: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """Calibration of every score by its name, see ``SCORES``.

    Attributes:
        patch_mean, patch_std: reconstruction error of each patch [N] on normal training images.
        threshold_images: which normal images gave the thresholds: "validation" or, where there
            were too few, "training", which makes them optimistic.
        quantization: None on processors without int8 products.
    """

    scores: dict[str, ScoreCalibration]
    patch_mean: list[float]
    patch_std: list[float]
    threshold_images: str
    quantization: Quantization | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of ``calibration.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        """The calibration that ``to_json`` gave."""
        scores = {name: ScoreCalibration(**score) for name, score in values["scores"].items()}
        quantization = values.get("quantization")
        if quantization is not None:
            ranges = {name: (low, high) for name, (low, high) in quantization["ranges"].items()}
            quantization = Quantization(**{**quantization, "ranges": ranges})
        return cls(**{**values, "scores": scores, "quantization": quantization})


def raw_scores(
    names: Collection[str],
    logits: Mapping[str, Tensor],
    patch_errors: Tensor,
    calibration: Calibration | None,
) -> dict[str, Tensor]:
    """Raw scores [B] by name, from logits [B] by name and patch errors [B, N].

    "patch_error" alone needs a calibration and raises ValueError without one.
    """
    values = dict(logits)
    if "reconstruction_error" in names:
        values["reconstruction_error"] = patch_errors.mean(dim=1)
    if "patch_error" in names:
        if calibration is None:
            raise ValueError("patch_error needs a calibration, but this scorer has none.")
        mean = patch_errors.new_tensor(calibration.patch_mean)
        std = patch_errors.new_tensor(calibration.patch_std)
        values["patch_error"] = ((patch_errors - mean) / std).amax(dim=1)
    return {name: values[name] for name in names}


def z_score(name: str, raw: Tensor, mean: float, std: float) -> Tensor:
    """float32, of raw scores; greater is less normal. Scores not in ``SCORES`` keep their sign."""
    sign = SCORES[name][0] if name in SCORES else +1
    # Subtracted in float64, since the deviation can be tiny beside the mean.
    return (sign * (raw.double() - mean) / std).float()
