"""The losses (paper section 3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..presets import Recipe


def _bce(logits: Tensor, target: float) -> Tensor:
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def generator_losses(
    images: Tensor, outputs: dict[str, Tensor | None], recon_logits: Tensor, recipe: Recipe
) -> dict[str, Tensor]:
    """The weighted terms [] of the generator's loss, whose sum is the loss."""
    recon, teacher = outputs["recon"], outputs["teacher_recon"]
    assert recon is not None
    terms = {
        "reconstruction": recipe.recon_w * F.mse_loss(recon.float(), images),
        "adversarial": recipe.g_w * _bce(recon_logits, 1.0),
    }
    if teacher is not None and outputs["dist_loss"] is not None:
        terms["teacher"] = recipe.t_w * F.mse_loss(teacher.float(), images)
        terms["distillation"] = recipe.dist_w * outputs["dist_loss"]
    return terms


def discriminator_loss(real_logits: Tensor, recon_logits: Tensor, recipe: Recipe) -> Tensor:
    """The loss [] of the discriminator on real images and detached reconstructions."""
    return recipe.d_w * (_bce(real_logits, 1.0) + _bce(recon_logits, 0.0))
