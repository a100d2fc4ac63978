"""Batch norm in training with residual and activation: operators, PyTorch's way, gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from .common import kernels, operator, shape, wide


def _layout_of(x: Tensor) -> torch.memory_format:
    """The layout of results for maps ``x``."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_layout_of(x))


def _over(x: Tensor) -> Tensor:
    """Values of channels [C], to be combined with maps."""
    return x[:, None, None]


def _batch_norm_statistics_cpu(
    x: Tensor, shift: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    num_batches_tracked: Tensor | None, momentum: float | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of every channel; the running statistics are moved."""
    var, mean = torch.var_mean(wide(x), dim=(0, 2, 3), correction=0)
    if running_mean is not None and running_var is not None and num_batches_tracked is not None:
        num_batches_tracked += 1
        share = 1 / num_batches_tracked.to(var.dtype) if momentum is None else momentum
        n = x.numel() // x.shape[1]
        running_mean += share * ((mean if shift is None else mean + shift) - running_mean)
        running_var += share * (var * (n / (n - 1)) - running_var)
    return mean, (var + eps).rsqrt()


def _batch_norm_cpu(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None,
    negative_slope: float,
) -> Tensor:  # fmt: skip
    z = (wide(x) - _over(mean)) * _over(rstd * weight) + _over(bias)
    if residual is not None:
        z = z + residual
    return torch.where(z <= 0, z * negative_slope if negative_slope else 0.0, z).to(
        x.dtype, memory_format=_layout_of(x)
    )


def _batch_norm_backward_cpu(
    grad: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and residual; the last empty unless ``y`` is given."""
    layout = _layout_of(x)
    normed = (wide(x) - _over(mean)) * _over(rstd)
    sign = normed * _over(weight) + _over(bias) if y is None else y
    g = wide(grad)
    g = torch.where(sign > 0, g, g * negative_slope)
    grad_bias, grad_weight = g.sum(dim=(0, 2, 3)), (g * normed).sum(dim=(0, 2, 3))
    n = x.numel() // x.shape[1]
    through_statistics = _over(grad_bias / n) + normed * _over(grad_weight / n)
    grad_x = _over(weight * rstd) * (g - through_statistics)
    grad_residual = grad.new_empty(0) if y is None else g.to(x.dtype, memory_format=layout)
    return grad_x.to(x.dtype, memory_format=layout), grad_weight, grad_bias, grad_residual


_MOVED = ("running_mean", "running_var", "num_batches_tracked")


@operator(_batch_norm_statistics_cpu, changes=_MOVED)
def _batch_norm_statistics(
    x: Tensor, shift: Tensor | None, running_mean: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    arguments = x, shift, running_mean, *rest
    if dispatch.serves_batch_norm(x, running_mean):
        return kernels("batch_norm").statistics(*arguments)
    return _batch_norm_statistics_cpu(*arguments)


@operator(_batch_norm_cpu)
def _batch_norm(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    if dispatch.serves_batch_norm(x, weight):
        return kernels("batch_norm").forward(x, mean, rstd, weight, *rest)
    return _batch_norm_cpu(x, mean, rstd, weight, *rest)


@operator(_batch_norm_backward_cpu)
def _batch_norm_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    arguments = grad, x, y, mean, rstd, weight, *rest
    if dispatch.serves_batch_norm(x, weight):
        return kernels("batch_norm").backward(*arguments)
    return _batch_norm_backward_cpu(*arguments)


@_batch_norm_statistics.register_fake
def _(x, *_):  # type: ignore[no-untyped-def]
    mean = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, torch.empty_like(mean)


@_batch_norm.register_fake
def _(x, *_):  # type: ignore[no-untyped-def]
    return _like(x)


@_batch_norm_backward.register_fake
def _(grad, x, y, mean, *_):  # type: ignore[no-untyped-def]
    grad_residual = grad.new_empty(0) if y is None else _like(x)
    return _like(x), torch.empty_like(mean), torch.empty_like(mean), grad_residual


def _save_maps(ctx: Any, inputs: Any, output: Any) -> None:
    x, mean, rstd, weight, bias, residual, ctx.negative_slope = inputs
    ctx.added = residual is not None
    # Behind a residual the sign of the result tells what the activation let through.
    y = output if ctx.added and ctx.negative_slope != 1 else None
    ctx.save_for_backward(x, y, mean, rstd, weight, bias)


def _map_gradients(ctx: Any, grad: Tensor) -> Any:
    x, y, mean, rstd, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_residual = _batch_norm_backward(
        grad, x, y, mean, rstd, weight, bias, ctx.negative_slope
    )
    if not ctx.added:
        grad_residual = None
    elif y is None:  # there was no activation
        grad_residual = grad
    of_parameters = grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
    return grad_x, None, None, *of_parameters, grad_residual, None


# Of x it is the whole gradient, that through mean and rstd, which have none of their own, included.
_batch_norm.register_autograd(_map_gradients, setup_context=_save_maps)


def _batch_norm_of_pytorch(
    x: Tensor, weight: Tensor, bias: Tensor,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    residual: Tensor | None, negative_slope: float, shift: Tensor | None,
    momentum: float | None, eps: float,
) -> Tensor:  # fmt: skip
    """PyTorch's own batch norm, and what follows in place: the fastest where no kernel serves."""
    share = 0.0
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        share = 1 / float(num_batches_tracked) if momentum is None else momentum
    # PyTorch keeps the running mean for its backward, and refuses one that was changed afterwards.
    unshifted = running_mean
    if shift is not None and running_mean is not None:
        unshifted = running_mean - shift
    y = F.batch_norm(x, unshifted, running_var, weight, bias, True, share, eps)
    if shift is not None and running_mean is not None and unshifted is not None:
        running_mean.copy_(unshifted + shift)
    if residual is not None:
        y += residual
    if negative_slope == 0:
        return y.relu_()
    return y if negative_slope == 1 else F.leaky_relu_(y, negative_slope)


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor,
    running_mean: Tensor | None = None, running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *, residual: Tensor | None = None, negative_slope: float = 1.0, shift: Tensor | None = None,
    momentum: float | None = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``leaky_relu((x - mean) / sqrt(var + eps) * weight + bias + residual)``, as in training.

    Paper section 3.1. Mean and variance are those of the batch, of every channel. The running
    statistics move as those of ``nn.BatchNorm2d`` do, gradients wanted or not: towards the mean and
    the unbiased variance. On GPUs in one operation, whose backward keeps nothing but ``x``, the
    statistics and, with a residual, the result; elsewhere PyTorch's own.

    Args:
        x: [B, C, H, W]; the result has its dtype and, channels-last or contiguous, its layout.
        weight, bias: [C].
        running_mean, running_var: [C], and num_batches_tracked: int64 []; all or none.
        residual: shape and dtype of ``x``.
        negative_slope: of LeakyReLU, in [0, 1]: 0 is ReLU, 1 no activation.
        shift: [C], a bias that the layer in front should have added to ``x``. Batch norm cancels
            it, but the running mean counts it. It has no gradient.
        momentum: share of the batch in the running statistics; None for their plain mean.

    Raises:
        ValueError: shapes or dtypes do not fit, the slope lies outside [0, 1], only some of the
            running statistics are given, or there is only one value per channel.

    >>> x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    >>> batch_norm(x, torch.ones(1), torch.zeros(1), negative_slope=0.5).flatten()
    tensor([-0.5000,  1.0000])
    """
    running = running_mean, running_var, num_batches_tracked
    _check(x, weight, bias, running, residual, negative_slope, shift)
    negative_slope, shift = float(negative_slope), None if shift is None else shift.detach()
    if not dispatch.serves_batch_norm(x, weight):
        return _batch_norm_of_pytorch(
            x, weight, bias, *running, residual, negative_slope, shift, momentum, eps
        )
    mean, rstd = _batch_norm_statistics(x.detach(), shift, *running, momentum, eps)
    return _batch_norm(x, mean, rstd, weight, bias, residual, negative_slope)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor | None, ...],
    residual: Tensor | None, negative_slope: float, shift: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {shape(x)} of {x.dtype}; floating-point [B, C, H, W] is needed.")
    C = x.shape[1]
    if x.numel() == C:
        raise ValueError(
            f"x is {shape(x)}: Expected more than 1 value per channel when training; a single one "
            "has no variance."
        )
    vectors = {"weight": weight, "bias": bias, "shift": shift}
    vectors |= dict(zip(_MOVED[:2], running[:2], strict=True))
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (C,):
            raise ValueError(f"{name} is {shape(vector)}; for x {shape(x)} it must be [{C}].")
    if len({value is None for value in running}) > 1:
        given = [name for name, value in zip(_MOVED, running, strict=True) if value is not None]
        raise ValueError(f"{' and '.join(given)} alone cannot be moved; give {', '.join(_MOVED)}.")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {shape(residual)} of {residual.dtype}; it must be {shape(x)} of "
            f"{x.dtype}, as x is."
        )
    if not 0.0 <= negative_slope <= 1.0:
        raise ValueError(f"negative_slope is {negative_slope}; it must lie in [0, 1].")
