"""The score of the discriminator: operator, PyTorch implementation, packed weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from .common import check_floating, kernels, operator, shape

_KERNEL, _SLOPE = 5, 0.2  # side of the convolutions, and slope of the leaky ReLU
_LARGEST = 10  # packed weights have their largest between 2^10 and 2^11


def _discriminator_score_cpu(
    images: Tensor, weights: list[Tensor], biases: list[Tensor], scales: list[Tensor],
    regressor: Tensor, regressor_bias: Tensor, packed: list[Tensor], eps: float,
) -> Tensor:  # fmt: skip
    x = images.to(regressor.dtype)
    if not len(x):  # instance normalisation does not take an empty batch
        return x.new_zeros(0)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        normalised = i > 0 and len(scales) > 0
        x = F.conv2d(x, weight, None if normalised else bias, stride=2, padding=_KERNEL // 2)
        if normalised:
            x = F.instance_norm(x, weight=scales[i - 1], bias=bias, eps=eps)
        x = F.leaky_relu(x, _SLOPE)
    # Not as a matrix product, whose rounding depends on the number of rows.
    return (x.flatten(1) * regressor).sum(dim=1) + regressor_bias


@operator(_discriminator_score_cpu)
def _discriminator_score(
    images: Tensor, weights: list[Tensor], biases: list[Tensor], scales: list[Tensor],
    regressor: Tensor, regressor_bias: Tensor, packed: list[Tensor], eps: float,
) -> Tensor:  # fmt: skip
    if dispatch.serves_discriminator_score(images, weights):
        packed = packed or pack_discriminator(weights, regressor)
        launchers = kernels("discriminator")
        return launchers.forward(images, biases, scales, regressor_bias, packed, eps)
    return _discriminator_score_cpu(
        images, weights, biases, scales, regressor, regressor_bias, packed, eps
    )


_discriminator_score.register_fake(
    lambda images, weights, biases, scales, regressor, *_: regressor.new_empty(len(images))
)


def pack_discriminator(weights: Sequence[Tensor], regressor: Tensor) -> list[Tensor]:
    """The weights of a discriminator as its kernels read them, for ``discriminator_score``.

    Args:
        weights: of the convolutions, float32 [Cout, Cin, 5, 5].
        regressor: float32 [F], F the numbers of the last map, channel by channel.

    Returns:
        The first layer's weights [25, Cout]; for every other layer two float16 numbers that add up
        to a weight times a power of two, [2, 25 Cin, Cout], and what undoes that, [Cout]; and the
        regressor place by place, [F / Cout, Cout].

    >>> weights = [torch.rand(2, 1, 5, 5), torch.rand(3, 2, 5, 5)]
    >>> [list(part.shape) for part in pack_discriminator(weights, torch.rand(12))]
    [[25, 2], [2, 50, 3], [3], [4, 3]]
    """
    packed = [weights[0].flatten(1).T.contiguous()]
    for weight in weights[1:]:
        rows = weight.permute(2, 3, 1, 0).flatten(0, 2)  # [25 Cin, Cout]: taps, then channels
        exponent = rows.abs().amax(dim=0).frexp().exponent
        rows = torch.ldexp(rows, _LARGEST + 1 - exponent)
        high = rows.half()
        packed.append(torch.stack([high, (rows - high).half()]))
        packed.append(torch.ldexp(torch.ones_like(rows[0]), exponent - _LARGEST - 1))
    return [*packed, regressor.view(weights[-1].shape[0], -1).T.contiguous()]


def discriminator_score(
    images: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    regressor: Tensor,
    regressor_bias: Tensor,
    *,
    scales: Sequence[Tensor] = (),
    eps: float = 1e-5,
    packed: Sequence[Tensor] = (),
) -> Tensor:
    """Logits [B] of the discriminator: convolutions, leaky ReLU of slope 0.2, and a dot product.

    Paper section 3.4. Convolutions are 5 x 5 with stride 2 and padding 2. With ``scales``, every
    one but the first is followed by an instance norm, which cancels a bias of its own. Computed as
    exactly as in float32; without gradients. NaN stays within its image, and so does NaN that
    values beyond 65504 in a map become on a GPU.

    Args:
        images: [B, 1, H, W], floating.
        weights: of the convolutions, [Cout, Cin, 5, 5] each.
        biases: [Cout] each: the norm's behind a convolution that has a norm, else its own.
        regressor: [F], F the numbers of the last map, channel by channel.
        regressor_bias: [1].
        scales: [Cout] each, the weights of the norms, for every convolution but the first.
        eps: of the norms.
        packed: what ``pack_discriminator`` makes of ``weights`` and ``regressor``; without it, a
            GPU makes it anew at every call.

    Raises:
        ValueError: shapes do not fit one another, the last map is a single pixel, which has no
            statistics, or a gradient is asked for.

    >>> weights = [torch.ones(2, 1, 5, 5), torch.ones(1, 2, 5, 5)]
    >>> biases = [torch.zeros(2), torch.zeros(1)]
    >>> discriminator_score(torch.ones(1, 1, 3, 3), weights, biases, torch.ones(1), torch.ones(1))
    tensor([73.])
    """
    check_floating("images", images)
    _check_shapes(images, weights, biases, scales, regressor)
    tensors = (images, *weights, *biases, *scales, regressor, regressor_bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "images or parameters require a gradient, which this score does not have; call it "
            "under torch.no_grad(), or Discriminator.score, which has one."
        )
    return _discriminator_score(
        images, list(weights), list(biases), list(scales), regressor, regressor_bias,
        list(packed), float(eps),
    )  # fmt: skip


def _check_shapes(
    images: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[Tensor],
    regressor: Tensor,
) -> None:
    if images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(f"images is {shape(images)}; [B, 1, H, W] would fit.")
    if len(weights) < 2 or len(biases) != len(weights):
        raise ValueError(
            f"there are {len(weights)} weights and {len(biases)} biases; as many of both are "
            "needed, two at least."
        )
    if len(scales) not in (0, len(weights) - 1):
        raise ValueError(
            f"there are {len(scales)} scales; none or {len(weights) - 1}, one for each "
            "convolution but the first, would fit."
        )
    channels, (height, width) = 1, images.shape[2:]
    vectors = [(biases[0],), *zip(biases[1:], scales or biases[1:], strict=True)]
    for weight, of_layer in zip(weights, vectors, strict=True):
        fits = (weight.shape[0], channels, _KERNEL, _KERNEL)
        if weight.shape != fits:
            raise ValueError(
                f"weights are {', '.join(map(shape, weights))}; [Cout, Cin, 5, 5] with 1, then the "
                "Cout before, for Cin would fit."
            )
        channels, height, width = weight.shape[0], (height + 1) // 2, (width + 1) // 2
        for vector in of_layer:
            if vector.shape != (channels,):
                raise ValueError(
                    f"a bias or scale is {shape(vector)} behind weights {shape(weight)}; "
                    f"[{channels}] would fit."
                )
    if regressor.shape != (channels * height * width,):
        raise ValueError(
            f"regressor is {shape(regressor)}, but the last map is "
            f"{[channels, height, width]}; [{channels * height * width}] would fit."
        )
    if scales and height * width == 1:
        raise ValueError(
            f"images is {shape(images)}, whose last map is a single pixel, which has no "
            "statistics; larger images, or no scales, would fit."
        )
