"""The discriminator and the raw scores that it gives (paper section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm is no subclass of BatchNorm2d

from .images import VALUE_RANGE, check_precision, check_tensor, check_values
from .norm import NormSequential
from .state import Network

WIDTHS = (16, 32, 64, 128, 128)

ScoreMode = Literal["instance", "running"]


class Discriminator(Network):
    """Tells real images from reconstructions: positive logits mean real.

    Args:
        size: image side / 32, rounded up.

    >>> import torch
    >>> discriminator = Discriminator(discriminator_size(48))
    >>> images = torch.rand(3, 1, 48, 48)
    >>> discriminator(images).shape, discriminator.score(images).shape
    (torch.Size([3, 1]), torch.Size([3]))
    """

    value_range: ClassVar[tuple[float, float]] = VALUE_RANGE

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size is {size}; it must be the image side / 32, rounded up.")
        self.size = size
        layers: list[nn.Module] = []
        in_ch = 1
        for i, width in enumerate(WIDTHS):
            layers.append(nn.Conv2d(in_ch, width, 5, stride=2, padding=2))
            if i:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.LeakyReLU(0.2))
            in_ch = width
        self.conv_model = NormSequential(*layers)
        self.regressor = nn.Linear(in_ch * size * size, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 1] of images [B, 1, H, W] in [0, 1].

        Raises:
            ValueError: images that a ``SQUID`` would not take either. In training NaN passes:
                where the generator's reconstructions have diverged, the loss shall tell.
        """
        self._check(images)
        return self.regressor(self.conv_model(images).flatten(1))

    def score(self, images: Tensor, mode: ScoreMode = "instance") -> Tensor:
        """Raw scores [B] of images [B, 1, H, W] in [0, 1]; the module stays as it is.

        ``"instance"`` normalises every image by its own statistics, at any batch size. The
        published evaluation does so by leaving the module in training mode with batches of one.
        ``"running"`` uses the running statistics.

        Raises:
            ValueError: another mode, or images that a ``SQUID`` would not take either.
        """
        self._check(images)
        return self.score_unchecked(images, mode)

    def score_unchecked(self, images: Tensor, mode: ScoreMode) -> Tensor:
        """``score`` of images that are known to fit."""
        if mode not in ("instance", "running"):
            raise ValueError(f"mode is {mode!r}; it must be 'instance' or 'running'.")
        if mode == "instance" and self.size == 1:
            raise ValueError(
                "mode 'instance' needs images larger than 32 x 32: at that size the last feature "
                "map is a single pixel, which has no statistics. Use 'running'."
            )
        if images.shape[0] == 0:  # instance normalisation does not take an empty batch
            return images.new_zeros(0)
        x = images
        for layer in self.conv_model:
            if not isinstance(layer, _BatchNorm):
                x = layer(x)
            elif mode == "instance":
                x = F.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=layer.eps)
            else:
                statistics = layer.running_mean, layer.running_var
                x = F.batch_norm(x, *statistics, layer.weight, layer.bias, eps=layer.eps)
        # Not as a matrix product, whose rounding depends on the number of rows.
        return (x.flatten(1) * self.regressor.weight).sum(dim=1) + self.regressor.bias

    def fitting(self, state: Mapping[str, Any]) -> str:
        if any(name.endswith("in_conv.conv.conv1.0.weight") for name in state):
            return "It is the state dict of a SQUID"
        weight = state.get("regressor.weight")
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            return ""
        size = math.isqrt(weight.shape[1] // WIDTHS[-1])
        return f"It is of a Discriminator(size={size}), for images of {32 * size} x {32 * size}"

    def _check(self, images: Tensor) -> None:
        check_tensor(images, self.value_range)
        most = 32 * self.size
        sides = range(most - 31, most + 1)
        one_channel = images.dim() == 4 and images.shape[1] == 1
        if not (one_channel and images.shape[2] in sides and images.shape[3] in sides):
            raise ValueError(
                f"images are {list(images.shape)}; a Discriminator(size={self.size}) takes "
                f"[B, 1, {most}, {most}] (sides from {sides[0]} on)."
            )
        check_precision(images, self)
        check_values(images, self.value_range, self.training, nan_passes=self.training)


def discriminator_size(image_size: int) -> int:
    """The ``size`` of the discriminator for images of this side: image_size / 32, rounded up.

    >>> discriminator_size(128), discriminator_size(48)
    (4, 2)
    """
    return -(-image_size // 32)
