"""The resize in front of a decoder's step (paper section 3.1; sizes as in the published code).

A step of the decoder doubles the side of its maps, bilinearly, and puts the encoder's maps of that
size, the skip, in front of their channels. Where the decoder goes from patches to images, the
patches are put together first.
"""

import torch
import torch.nn.functional as F
from einops import rearrange


def upsample_concat(
    x: torch.Tensor, skip: torch.Tensor | None = None, num_patch: int = 1
) -> torch.Tensor:
    """Patches [B*P*P, C, H/P, W/P] and a skip [B, S, 2H, 2W] to [B, S + C, 2H, 2W].

    >>> upsample_concat(torch.tensor([[[[0.0, 4.0]]]]))[0, 0].tolist()
    [[0.0, 1.0, 3.0, 4.0], [0.0, 1.0, 3.0, 4.0]]
    """
    x = rearrange(x, "(b i j) c h w -> b c (i h) (j w)", i=num_patch, j=num_patch)
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return x if skip is None else torch.cat([skip, x], dim=1)
