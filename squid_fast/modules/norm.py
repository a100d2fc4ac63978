"""Convolutions with batch norms behind them, whose training passes over every map fewer times."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm is no subclass of BatchNorm2d

from .. import ops


class NormSequential(nn.Sequential):
    """An ``nn.Sequential`` that in training takes batch norm and activation as one operation.

    A bias of a convolution in front of a batch norm, which the published checkpoints have, changes
    nothing in training but the running mean, since the batch's mean cancels it: so it is added to
    that mean alone. Its gradient is zero, and stays None, for an optimiser to leave the bias alone:
    what other programs compute for it is rounding noise, which Adam magnifies to full steps.

    Layers that are not those of the published network, or that carry hooks, are called one by one,
    as all are in evaluation.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layers' result; with a residual of its shape, ``relu(result + residual)``."""
        x, layers = input, list(self)
        while layers:
            front = _conv_and_norm(layers)
            if front is None:
                x = layers.pop(0)(x)
                continue
            slope = _negative_slope(layers[2]) if len(layers) > 2 else None
            del layers[: 2 if slope is None else 3]
            added = None
            if not layers and slope is None and residual is not None:
                added, residual, slope = residual, None, 0.0
            x = _conv_norm(*front, x, added, 1.0 if slope is None else slope)
        return x if residual is None else (x + residual).relu_()


def freeze_cancelled_biases(module: nn.Module) -> None:
    """Declare that biases of convolutions in front of batch norms want no gradient.

    They get none in training either way. It has to be said where something waits for the gradient
    of every parameter, as ``DistributedDataParallel`` does, and where other layers' batch norm,
    such as the synchronised one, would compute the rounding noise in it.

    >>> sequence = NormSequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> freeze_cancelled_biases(sequence)
    >>> [name for name, p in sequence.named_parameters() if p.requires_grad]
    ['0.weight', '1.weight', '1.bias']
    """
    for sequence in module.modules():
        if isinstance(sequence, NormSequential):
            for layer, norm in pairwise(sequence):
                if isinstance(norm, _BatchNorm) and isinstance(layer.bias, nn.Parameter):
                    layer.bias.requires_grad_(False)


def _conv_and_norm(layers: list[nn.Module]) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    """The first two layers, if they are PyTorch's own and normalise by the batch's statistics."""
    if len(layers) < 2:
        return None
    conv, norm = layers[:2]
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
        return None
    joins = (
        norm.training
        and norm.affine
        and norm.track_running_stats
        and conv.padding_mode == "zeros"
        and not _has_hooks(conv)
        and not _has_hooks(norm)
    )
    return (conv, norm) if joins else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _negative_slope(activation: nn.Module) -> float | None:
    """Of the activation, if it can be part of the operation."""
    if _has_hooks(activation):
        return None
    if type(activation) is nn.LeakyReLU:
        return activation.negative_slope
    return 0.0 if type(activation) is nn.ReLU else None


def _conv_norm(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, slope: float
) -> Tensor:
    x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return ops.batch_norm(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked,
        residual=residual, negative_slope=slope, shift=conv.bias,
        momentum=norm.momentum, eps=norm.eps,
    )  # fmt: skip
