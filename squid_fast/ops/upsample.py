"""The resize in front of a decoder's stage, with its skip: operator, PyTorch implementation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from .common import DECOMPOSITIONS, check_floating, kernels, operator, shape
from .patches import to_image, to_patches


def _layout(x: Tensor) -> torch.memory_format:
    """That of results: channels-last where neighbouring channels of ``x`` lie side by side."""
    is_last = x.stride(1) == 1 < x.stride(3)
    return torch.channels_last if is_last else torch.contiguous_format


def _empty(size: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=_layout(like))


def _empty_result(x: Tensor, skip: Tensor | None, num_patch: int) -> Tensor:
    N, C, h, w = x.shape
    S = 0 if skip is None else skip.shape[1]
    return _empty((N // num_patch**2, S + C, 2 * num_patch * h, 2 * num_patch * w), x)


def _empty_gradient(grad: Tensor, channels: int, num_patch: int) -> Tensor:
    B, _, H, W = grad.shape
    return _empty((B * num_patch**2, channels, H // 2 // num_patch, W // 2 // num_patch), grad)


def _upsample_concat_cpu(x: Tensor, skip: Tensor | None, num_patch: int) -> Tensor:
    layout = _layout(x)
    x = to_image(x, num_patch) if num_patch > 1 else x
    size = (2 * x.shape[2], 2 * x.shape[3])
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    x = x if skip is None else torch.cat([skip, x], dim=1)
    return x.contiguous(memory_format=layout)


def _upsample_concat_backward_cpu(grad: Tensor, channels: int, num_patch: int) -> Tensor:
    """Gradient of x [B P P, C, H / P, W / P] from that of the result [B, S + C, 2H, 2W]."""
    B, _, H, W = grad.shape
    layout = _layout(grad)
    # Of channels-last gradients whose channels do not lie side by side alone, PyTorch's kernel is
    # several times slower than with a copy of them.
    grad = grad[:, grad.shape[1] - channels :].contiguous(memory_format=layout)
    grad = torch.ops.aten.upsample_bilinear2d_backward(
        grad, [H, W], [B, channels, H // 2, W // 2], align_corners=False
    )
    grad = to_patches(grad, num_patch) if num_patch > 1 else grad
    return grad.contiguous(memory_format=layout)


@operator(_upsample_concat_cpu)
def _upsample_concat(x: Tensor, skip: Tensor | None, num_patch: int) -> Tensor:
    if dispatch.serves_upsample_concat(x):
        result = _empty_result(x, skip, num_patch)
        return kernels("upsample_concat").forward(x, skip, num_patch, result)
    return _upsample_concat_cpu(x, skip, num_patch)


@operator(_upsample_concat_backward_cpu)
def _upsample_concat_backward(grad: Tensor, channels: int, num_patch: int) -> Tensor:
    if dispatch.serves_upsample_concat(grad):
        gradient = _empty_gradient(grad, channels, num_patch)
        return kernels("upsample_concat").backward(grad, num_patch, gradient)
    return _upsample_concat_backward_cpu(grad, channels, num_patch)


_upsample_concat.register_fake(_empty_result)
_upsample_concat_backward.register_fake(_empty_gradient)


def _save_sizes(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, _, ctx.num_patch = inputs
    ctx.channels = x.shape[1]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    of_x, of_skip, _ = ctx.needs_input_grad
    grad_x = _upsample_concat_backward(grad, ctx.channels, ctx.num_patch) if of_x else None
    # A view, as of PyTorch's concatenation: whoever adds it up reads it where it is.
    grad_skip = grad[:, : grad.shape[1] - ctx.channels] if of_skip else None
    return grad_x, grad_skip, None


_upsample_concat.register_autograd(_gradients, setup_context=_save_sizes)

DECOMPOSITIONS[torch.ops.squid_fast.upsample_concat.default] = _upsample_concat_cpu


def upsample_concat(x: Tensor, skip: Tensor | None = None, *, num_patch: int = 1) -> Tensor:
    """Maps [B, C, H, W] resized to twice their side, behind the channels of a skip.

    Bilinear, corners not aligned (paper section 3.1, the step of the decoder). With ``num_patch``
    P, ``x`` is the patches of the maps, [B*P*P, C, H/P, W/P], row-major, patch index fastest; they
    are put together on the way.

    Args:
        x: as above; the result has its dtype, and is channels-last if it is.
        skip: [B, S, 2H, 2W], which comes first in the result; converted to the dtype of ``x``.
        num_patch: P, patches per side.

    Returns:
        [B, S + C, 2H, 2W], S = 0 without a skip.

    Raises:
        ValueError: a shape does not fit, or ``x`` is not floating point.

    >>> upsample_concat(torch.tensor([[[[0.0, 4.0]]]]), torch.ones(1, 1, 2, 4))[0, :, 0]
    tensor([[1., 1., 1., 1.],
            [0., 1., 3., 4.]])
    """
    check_floating("x", x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x is {shape(x)}; it must be [B, C, H, W], with C, H and W at least 1.")
    if num_patch < 1 or x.shape[0] % num_patch**2:
        raise ValueError(
            f"num_patch is {num_patch} and x {shape(x)}; num_patch must be at least 1, and its "
            "square must divide the number of patches."
        )
    if skip is not None:
        B, H, W = x.shape[0] // num_patch**2, num_patch * x.shape[2], num_patch * x.shape[3]
        if skip.dim() != 4 or (skip.shape[0], *skip.shape[2:]) != (B, 2 * H, 2 * W):
            raise ValueError(f"skip is {shape(skip)}; [{B}, S, {2 * H}, {2 * W}] would fit this x.")
        skip = skip.to(x.dtype)
    return _upsample_concat(x, skip, num_patch)
