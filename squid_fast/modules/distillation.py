"""The loss by which the student's decoder follows the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_WIDE = (torch.float32, torch.float64)


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum [] of the mean squared differences of the maps, float32 at least (paper section 3.5).

    Both sides learn from it, as in the published code, which detaches neither.

    >>> float(distillation_loss([torch.zeros(2, 3)], [torch.ones(2, 3)]))
    1.0
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([_mean_squared(s, t) for s, t in pairs]).sum()


def _mean_squared(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype in _WIDE or b.dtype in _WIDE:
        return (a - b).square().mean()
    mean: Tensor = _HalfMeanSquared.apply(a, b)
    return mean


class _HalfMeanSquared(torch.autograd.Function):
    """Mean square [] in float32 of the difference of maps of one half-precision dtype.

    ``mse_loss`` would have autocast convert both maps to float32, and so would the gradient of
    ``vector_norm``. Here no pass over a map is in float32.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        difference = a - b
        ctx.save_for_backward(difference)
        norm = torch.linalg.vector_norm(difference, dtype=torch.float32)
        return norm.square() / difference.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (difference,) = ctx.saved_tensors
        grad_a = difference * (grad * (2 / difference.numel()))
        return grad_a, -grad_a
