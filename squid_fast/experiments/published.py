"""The published way of evaluating, which squid_fast is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..inference import Scorer
from ..inference.bundle import Bundle
from ..utils.tf32 import tf32

_TOLERANCE = 0.01  # standard deviations


def published_way(
    bundle: Bundle, device: torch.device, in_tf32: bool = False
) -> Callable[[Tensor], Tensor]:
    """The published scores [B] of images [B, 1, H, W]: the logits of ``reference``, in float32.

    On a GPU PyTorch would compute convolutions in TF32 unless told otherwise; see ``utils.tf32``.

    Raises:
        ValueError: the model is a variant that was never published.
    """
    if "inpainting" in bundle.model.config:
        raise ValueError(
            f"this model has inpainting={bundle.model.config['inpainting']!r}, a variant that was "
            "never published; only published models can be compared with the published way."
        )
    model = reference.SQUID(**bundle.model.config)
    model.load_state_dict(bundle.model.state_dict())
    discriminator = reference.Discriminator(bundle.discriminator.size)
    discriminator.load_state_dict(bundle.discriminator.state_dict())
    model.eval().to(device), discriminator.eval().to(device)

    @torch.no_grad()
    def score(images: Tensor) -> Tensor:
        with tf32(in_tf32):
            recon = model(images.to(device))["recon"]
            return reference.discriminator_logits(discriminator, recon).cpu()

    return score


def check_agreement(published: Callable[[Tensor], Tensor], scorer: Scorer, images: Tensor) -> None:
    """Check that a float32 scorer of the paper's score agrees with ``published_way`` on images.

    Raises:
        RuntimeError: the scores differ by a hundredth of their standard deviation or more.
    """
    theirs, ours = published(images), scorer.score(images).raw
    # Their median: where two slots of a memory are equally near, rounding may choose between them.
    off = float((theirs - ours).abs().median() / theirs.std().clamp_min(1e-6))
    if not off < _TOLERANCE:
        raise RuntimeError(
            f"the scores of squid_fast are off by {off:.3g} of their standard deviation from the "
            f"published way's, both in float32; less than {_TOLERANCE} would do."
        )
