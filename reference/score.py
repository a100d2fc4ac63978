"""The anomaly score (paper section 3.4, "Anomaly Discrimination").

    s = D(recon),    A = 1 - sigmoid((s - mean) / std)

with mean and std of s over normal training images; A near 1 means anomalous. The published
evaluation leaves the discriminator in training mode and feeds it one image at a time, so each
image is normalised by its own statistics: ``mode="instance"``. ``mode="running"`` uses the running
statistics, which is what a reader of the paper would expect, and ranks worse.
"""

import torch
from torch import nn

from .discriminator import Discriminator


@torch.no_grad()
def discriminator_logits(
    discriminator: Discriminator, recon: torch.Tensor, mode: str = "instance"
) -> torch.Tensor:
    """Raw scores s [B] of reconstructions [B, 1, H, W]; running statistics stay as they are.

    >>> discriminator_logits(Discriminator(size=2), torch.rand(3, 1, 64, 64)).shape
    torch.Size([3])
    """
    if mode not in ("instance", "running"):
        raise ValueError(f"mode is {mode!r}; it must be 'instance' or 'running'.")
    logits = []
    for image in recon.split(1):
        x = image
        for layer in discriminator.conv_model:
            if isinstance(layer, nn.BatchNorm2d) and mode == "instance":
                x = nn.functional.batch_norm(
                    x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps
                )
            elif isinstance(layer, nn.BatchNorm2d):
                x = nn.functional.batch_norm(
                    x,
                    layer.running_mean,
                    layer.running_var,
                    layer.weight,
                    layer.bias,
                    training=False,
                    eps=layer.eps,
                )
            else:
                x = layer(x)
        logits.append(discriminator.regressor(x.flatten(1))[:, 0])
    return torch.cat(logits)


def z_score(scores: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Standard deviations *below* the normal mean: larger is less normal. Rank images by this.

    >>> z_score(torch.tensor([5.0, 1.0]), mean=3.0, std=2.0)
    tensor([-1.,  1.])
    """
    return (mean - scores) / std


def anomaly_score(scores: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """A in [0, 1], 1 is anomalous. In float32 it saturates and ties where z does not.

    >>> anomaly_score(torch.tensor([5.0, 3.0, 1.0]), mean=3.0, std=2.0)
    tensor([0.2689, 0.5000, 0.7311])
    """
    return torch.sigmoid(z_score(scores, mean, std))
