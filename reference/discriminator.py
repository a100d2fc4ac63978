"""The discriminator (paper section 3.4), which tells real images from reconstructions.

Five 5x5 convolutions of stride 2, batch norm in all but the first, one linear layer to a logit.
"""

import torch
from torch import nn

WIDTHS = (16, 32, 64, 128, 128)


class Discriminator(nn.Module):
    """Logits [B, 1] (positive: real) for images [B, 1, H, W] with H = W and size = ceil(H / 32).

    >>> Discriminator(size=2)(torch.rand(3, 1, 64, 64)).shape
    torch.Size([3, 1])
    """

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, width in enumerate(WIDTHS):
            layers.append(nn.Conv2d(WIDTHS[i - 1] if i else 1, width, 5, stride=2, padding=2))
            if i:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.LeakyReLU(0.2))
        self.conv_model = nn.Sequential(*layers)
        self.regressor = nn.Linear(WIDTHS[-1] * size * size, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.regressor(self.conv_model(images).flatten(1))
