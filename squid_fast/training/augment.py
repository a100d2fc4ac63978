"""Random shift and scale of a whole batch, computed on its device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, shift: float, scale: float) -> Tensor:
    """Shift each image by up to ``shift`` of its side and scale it by 1 - scale to 1 + scale.

    This is the published augmentation of the chest X-rays. Pixels from outside the image are black.
    Images are [B, C, H, W]. ``shift`` and ``scale`` lie in [0, 1); with both 0 nothing changes.
    """
    if shift == 0 and scale == 0:
        return images
    B = images.shape[0]
    draw = torch.rand(B, 3, device=images.device) * 2 - 1
    theta = torch.zeros(B, 2, 3, device=images.device)
    zoom = 1 / (1 + scale * draw[:, 0])  # the grid says where a pixel comes from: the inverse
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = draw[:, 1:] * 2 * shift  # the grid's sides run from -1 to 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
