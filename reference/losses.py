"""The losses (paper section 3.5).

Generator:      recon_w * MSE(recon, x) + g_w * BCE(D(recon), 1)
                + t_w * MSE(teacher_recon, x) + dist_w * dist_loss
Discriminator:  d_w * (BCE(D(x), 1) + BCE(D(recon), 0)),    recon detached
"""

import torch
import torch.nn.functional as F


def _bce(logits: torch.Tensor, target: float) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def generator_loss(
    images: torch.Tensor,
    outputs: dict[str, torch.Tensor | None],
    recon_logits: torch.Tensor,
    recon_w: float = 10.0,
    g_w: float = 0.005,
    t_w: float = 0.01,
    dist_w: float = 0.001,
) -> torch.Tensor:
    """Loss [] of the generator; without a teacher its terms are left out.

    >>> images, recon = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)
    >>> outputs = {"recon": recon, "teacher_recon": None, "dist_loss": None}
    >>> generator_loss(images, outputs, torch.zeros(2, 1))  # 10 * 0.25 + 0.005 * log 2
    tensor(2.5035)
    """
    recon, teacher, dist_loss = (outputs[k] for k in ("recon", "teacher_recon", "dist_loss"))
    assert recon is not None
    loss = recon_w * F.mse_loss(recon, images) + g_w * _bce(recon_logits, 1.0)
    if teacher is not None and dist_loss is not None:
        loss = loss + t_w * F.mse_loss(teacher, images) + dist_w * dist_loss
    return loss


def discriminator_loss(
    real_logits: torch.Tensor, recon_logits: torch.Tensor, d_w: float = 0.005
) -> torch.Tensor:
    """Loss [] of the discriminator.

    >>> discriminator_loss(torch.zeros(2, 1), torch.zeros(2, 1), d_w=1.0)  # 2 * log 2
    tensor(1.3863)
    """
    return d_w * (_bce(real_logits, 1.0) + _bce(recon_logits, 0.0))
