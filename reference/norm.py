"""Batch norm in training, and what follows it in a residual double convolution (paper section 3.1).

    y = act(weight (x - mean) / sqrt(var + eps) + bias + residual)

Mean and variance are those of the batch, of each channel over images, rows and columns. A bias of
the convolution in front shifts x and mean alike, so that it changes nothing here.
"""

import torch
import torch.nn.functional as F


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    negative_slope: float = 1.0,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Map [B, C, H, W] normalised, with ``weight`` and ``bias`` [C].

    The activation is LeakyReLU: a ``negative_slope`` of 0 is ReLU, 1 none.

    >>> x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    >>> batch_norm(x, torch.ones(1), torch.zeros(1), negative_slope=0.5, eps=0.0).flatten()
    tensor([-0.5000,  1.0000])
    """
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    var = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
    y = (x - mean) / torch.sqrt(var + eps) * weight[:, None, None] + bias[:, None, None]
    if residual is not None:
        y = y + residual
    return F.leaky_relu(y, negative_slope)
