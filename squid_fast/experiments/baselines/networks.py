"""Networks that SQUID is compared with; they score images by their reconstruction error.

All are built of SQUID's own residual double convolutions, so that only the method differs. Each
maps images to their reconstruction error and their reconstruction.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...modules import MemoryMatrix
from ...modules.unet import Down, InConv, OutConv, Up
from ...utils.devices import choose_layout, to_layout


class AutoEncoder(nn.Module):
    """A plain convolutional auto-encoder; what does not pass its bottleneck is anomalous.

    Args:
        image_size: side S of the images in pixels; ``2**levels`` must divide it.
        width: channels of the first level; the levels below have 2, 4, 8, ... times as many.
        levels: number of times that the resolution is halved.
        latent: channels of the bottleneck.
    """

    score_name: ClassVar[str] = "reconstruction_error"
    op: ClassVar[str] = "none"
    channels: ClassVar[int] = 1

    def __init__(
        self, image_size: int = 128, width: int = 16, levels: int = 4, latent: int = 16
    ) -> None:
        super().__init__()
        if image_size < 1 or image_size % 2**levels:
            raise ValueError(
                f"image_size is {image_size}; {2**levels} must divide it, since the resolution is "
                f"halved {levels} times."
            )
        self.config: dict[str, Any] = {
            "image_size": image_size, "width": width, "levels": levels, "latent": latent,
        }  # fmt: skip
        widths = [width * 2**i for i in range(levels + 1)]
        self.in_conv = InConv(self.channels, width)
        self.downs = nn.ModuleList(Down(a, b) for a, b in itertools.pairwise(widths))
        self.narrow = nn.Conv2d(widths[-1], latent, 1)
        self.widen = nn.Conv2d(latent, widths[-1], 1)
        skip = 2 if self.op == "concat" else 1
        self.ups = nn.ModuleList(
            Up(b + (skip - 1) * a, a, self.op)
            for a, b in reversed(list(itertools.pairwise(widths)))
        )
        self.out_conv = OutConv(width, 1)
        to_layout(self, choose_layout(width))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstructions [B, 1, S, S] from inputs [B, channels, S, S]."""
        x, skips = self.in_conv(x), []
        for down in self.downs:
            skips.append(x)
            x = down(x)
        x = self.widen(self.remember(self.narrow(x)))
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return self.out_conv(x).float()

    def remember(self, latent: Tensor) -> Tensor:
        """What the decoder gets for the bottleneck [B, latent, h, w]; here the same."""
        return latent

    def loss(self, images: Tensor) -> Tensor:
        """The loss [] on training images [B, 1, S, S]."""
        return F.mse_loss(self.reconstruct(images), images)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B] of images [B, 1, S, S], greater for the less normal, and reconstructions."""
        recon = self.reconstruct(images)
        return (recon - images).square().mean(dim=(1, 2, 3)), recon


class MemAE(AutoEncoder):
    """Memory-augmented auto-encoder (Gong et al., ICCV 2019).

    Every position of the bottleneck becomes a sum of slots, weighted by the softmax of their
    similarities after hard shrinkage; the entropy of the weights is kept low (their equations 3 to
    9).

    Args:
        num_slots: number M of slots.
        threshold: threshold of the shrinkage, in units of 1 / M; Gong et al. advise 1 to 3.
    """

    ENTROPY = 0.0002  # published weight

    def __init__(self, num_slots: int = 200, threshold: float = 1.0, **network: int) -> None:
        super().__init__(**network)
        self.config |= {"num_slots": num_slots, "threshold": threshold}
        self.threshold = threshold / num_slots
        self.memory = MemoryMatrix(num_slots, self.config["latent"], self.threshold, None)

    def weights(self, latent: Tensor) -> Tensor:
        """Weights [B * h * w, M] of the slots for the bottleneck [B, latent, h, w]."""
        query = latent.permute(0, 2, 3, 1).flatten(0, 2).float()
        similarity = F.linear(query, self.memory.slots[0])
        return ops.hard_shrinkage(torch.softmax(similarity, dim=1), self.threshold)

    def remember(self, latent: Tensor) -> Tensor:
        B, _, h, w = latent.shape
        weights = self.weights(latent)
        self._entropy = -(weights * (weights + 1e-12).log()).sum(dim=1).mean()
        answer = weights @ self.memory.slots[0]
        return answer.view(B, h, w, -1).permute(0, 3, 1, 2)

    def loss(self, images: Tensor) -> Tensor:
        loss = super().loss(images) + self.ENTROPY * self._entropy
        del self._entropy  # a copy of the network could not have its graph
        return loss


class PixelInpainting(AutoEncoder):
    """A U-Net that fills squares cut out of the image: it in-paints pixels, not features.

    In training a random quarter of the squares is missing. In evaluation four masks cut every
    square out exactly once, and the score is the error in the squares that were filled.
    """

    op = "concat"
    channels = 2  # the image with holes, and where they are
    SQUARES = 8  # a side

    def fill(self, images: Tensor, holes: Tensor) -> Tensor:
        """Reconstructions of images [B, 1, S, S] with holes [B or 1, 1, S, S] of 1."""
        return self.reconstruct(torch.cat([images * (1 - holes), holes.expand_as(images)], dim=1))

    def loss(self, images: Tensor) -> Tensor:
        drawn = torch.rand(len(images), 1, self.SQUARES, self.SQUARES, device=images.device) < 0.25
        holes = self._as_pixels(drawn)
        squared = (self.fill(images, holes) - images).square() * holes
        return squared.sum() / holes.sum().clamp_min(1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        recon = sum((self.fill(images, holes) * holes for holes in self.masks(images)), images * 0)
        return (recon - images).square().mean(dim=(1, 2, 3)), recon

    def masks(self, images: Tensor) -> list[Tensor]:
        """Four masks [1, 1, S, S], of which exactly one covers each pixel."""
        index = torch.arange(self.SQUARES, device=images.device) % 2
        place = 2 * index[:, None] + index
        return [self._as_pixels((place == number)[None, None]) for number in range(4)]

    def _as_pixels(self, squares: Tensor) -> Tensor:
        side = self.config["image_size"]
        times = math.ceil(side / self.SQUARES)
        grown = squares.float().repeat_interleave(times, 2).repeat_interleave(times, 3)
        return grown[..., :side, :side]
