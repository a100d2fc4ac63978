"""Convolutions that make cells of outputs from windows: operator, PyTorch implementation, weights.

See ``squid_fast.kernels.convolution`` for what they are good for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from .common import check_floating, kernels, operator, shape, wide


def output_size(x: Tensor, weights: Tensor, step: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the result, of cells that lie a step of input pixels apart."""
    (H, W), (cell_y, cell_x) = x.shape[2:], weights.shape[5:7]
    return -(-H * cell_y // step[0]), -(-W * cell_x // step[1])


def kinds_along(kinds: int, size: int) -> list[slice]:
    """The cells of every kind along an axis of so many cells: the first, inner ones, the last.

    >>> kinds_along(3, 8)
    [slice(0, 1, None), slice(1, 7, None), slice(7, 8, None)]
    """
    if kinds == 1:
        return [slice(0, size)]
    inner = [slice(1, size - 1)] if kinds == 3 else []
    return [slice(0, 1), *inner, slice(size - 1, size)]


def _cell_convolution_cpu(
    x: Tensor, weights: Tensor, bias: Tensor, step: list[int],
    residual: Tensor | None, head_weight: Tensor | None, head_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    kinds_y, kinds_x, window_y, window_x, _, cell_y, cell_x, D = weights.shape
    (B, _, H, W), (S, T) = x.shape, step
    cells_y, cells_x = -(-H // S), -(-W // T)
    ends = (cells_x - 1) * T + window_x - 1 - W, (cells_y - 1) * S + window_y - 1 - H
    padded = F.pad(wide(x), (1, ends[0], 1, ends[1]))
    filters = wide(weights).permute(0, 1, 5, 6, 7, 4, 2, 3).flatten(2, 4)
    maps = padded.new_empty(B, cells_y, cell_y, cells_x, cell_x, D)
    rows, columns = kinds_along(kinds_y, cells_y), kinds_along(kinds_x, cells_x)
    for (i, ys), (j, xs) in product(enumerate(rows), enumerate(columns)):
        high = slice(ys.start * S, (ys.stop - 1) * S + window_y)
        broad = slice(xs.start * T, (xs.stop - 1) * T + window_x)
        found = F.conv2d(padded[:, :, high, broad], filters[i, j], stride=step)
        cells = found.unflatten(1, (cell_y, cell_x, D))
        maps[:, ys, :, xs] = cells.permute(0, 4, 1, 5, 2, 3)
    maps = maps.view(B, cells_y * cell_y, cells_x * cell_x, D)
    height, width = output_size(x, weights, step)
    maps = maps[:, :height, :width] + bias
    if residual is not None:
        maps += residual.permute(0, 2, 3, 1)
    maps = maps.relu_()
    if head_weight is None or head_bias is None:
        return maps.to(x.dtype).permute(0, 3, 1, 2)
    return torch.sigmoid(maps @ head_weight + head_bias)[:, None]


@operator(_cell_convolution_cpu)
def _cell_convolution(
    x: Tensor, weights: Tensor, bias: Tensor, step: list[int],
    residual: Tensor | None, head_weight: Tensor | None, head_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    rest = (weights, bias, step, residual, head_weight, head_bias)
    if dispatch.serves_cell_convolution(x, weights):
        return kernels("convolution").forward(x, *rest)
    return _cell_convolution_cpu(x, *rest)


@_cell_convolution.register_fake
def _(x, weights, bias, step, residual, head_weight, head_bias):  # type: ignore[no-untyped-def]
    size = (x.shape[0], *output_size(x, weights, step))
    if head_weight is None:
        return x.new_empty(*size, weights.shape[-1]).permute(0, 3, 1, 2)
    return bias.new_empty(size)[:, None]


def cell_weights(weight: Tensor, columns: int = 2) -> Tensor:
    """Weights of ``cell_convolution`` for a 3 x 3 [D, C, 3, 3], in cells of 1 x ``columns``.

    [1, 1, 3, 2 + columns, C, 1, columns, D]: every output uses its own three columns of the window.

    >>> cell_weights(torch.ones(1, 1, 3, 3))[0, 0, 0, :, 0, 0, :, 0]
    tensor([[1., 0.],
            [1., 1.],
            [1., 1.],
            [0., 1.]])
    """
    D, C, U, V = weight.shape
    weights = weight.new_zeros(1, 1, U, V - 1 + columns, C, 1, columns, D)
    for q in range(columns):
        weights[0, 0, :, q : q + V, :, 0, q] = weight.permute(2, 3, 1, 0)
    return weights


def _resized_taps(size: int) -> Tensor:
    """How a 3-tap convolution of an axis resized to twice its size reads the axis: float64.

    [kinds, 2, 3, 3]: kind of the pixel, output over it, tap of the convolution, and the pixel read:
    the one before, the pixel itself, the one behind. Pixels of an axis of three are of all kinds
    that there are: the first, an inner one, the last.
    """
    n = min(size, 3)
    each = torch.eye(n, dtype=torch.float64)[:, None]
    resized = F.interpolate(each, scale_factor=2, mode="linear", align_corners=False)
    seen = F.pad(resized[:, 0], (1, 1)).unfold(1, 3, 1).unflatten(1, (n, 2))  # [n, n, 2, 3]
    reads = F.pad(seen.permute(1, 2, 3, 0), (1, 1))  # by pixel, output, tap: [n, 2, 3, n + 2]
    return torch.stack([reads[i, ..., i : i + 3] for i in range(n)])


def resized_weights(weight: Tensor, height: int, width: int) -> Tensor:
    """Weights of ``cell_convolution`` for the resize to twice the side and a 3 x 3 behind it.

    Args:
        weight: of the convolution, [D, C, 3, 3], which pads with zeros; the resize is bilinear.
        height, width: of the maps before they are resized, on which the kinds of cells depend.

    Returns:
        float64 [min(height, 3), min(width, 3), 3, 3, C, 2, 2, D], to be rounded once.
    """
    rows, columns = (_resized_taps(size).to(weight.device) for size in (height, width))
    return torch.einsum("ipku,jqlv,dckl->ijuvcpqd", rows, columns, weight.double()).contiguous()


def cell_convolution(
    x: Tensor, weights: Tensor, bias: Tensor, step: tuple[int, int] = (1, 1),
    *, residual: Tensor | None = None, head: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """``relu(weights * x + bias + residual)``, a cell of P x Q outputs from a window of inputs.

    Cell (y, x) is made from the U x V pixels that begin at ``(S y - 1, T x - 1)``, those outside
    the map being zero; the cells lie side by side, cut off at H P / S rows and W Q / T columns
    (rounded up). Paper section 3.1: ``cell_weights`` makes weights of a 3 x 3 convolution,
    ``resized_weights`` of one behind the decoder's resize. Scores only: there is no gradient. NaN
    reaches all outputs of the windows that it lies in.

    Args:
        x: [B, C, H, W], fastest in channels-last.
        weights: [kinds, kinds, U, V, C, P, Q, D] of the dtype of x: along each axis 1 kind of
            cells; 2, the first and the last; or 3, the first, inner ones and the last.
        bias: [D], in float32.
        step: S, T.
        residual: of the shape and dtype of the result.
        head: weight [D] and bias [1], in float32, of a 1 x 1 convolution to one channel behind it
            all, and a sigmoid.

    Returns:
        [B, D, ceil(H P / S), ceil(W Q / T)] in channels-last; with a head [B, 1, ...] in float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a gradient is asked for.

    >>> weight, x = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)
    >>> cell_convolution(x, cell_weights(weight), torch.zeros(1), (1, 2))
    tensor([[[[4., 4.],
              [4., 4.]]]])
    >>> cell_convolution(x, resized_weights(weight, 2, 2).float(), torch.zeros(1))[0, 0]
    tensor([[4., 6., 6., 4.],
            [6., 9., 9., 6.],
            [6., 9., 9., 6.],
            [4., 6., 6., 4.]])
    """
    _check(x, weights, bias, step, residual, head)
    head_weight, head_bias = head or (None, None)
    return _cell_convolution(x, weights, bias, list(step), residual, head_weight, head_bias)


def _check(
    x: Tensor, weights: Tensor, bias: Tensor, step: tuple[int, int],
    residual: Tensor | None, head: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    check_floating("x", x)
    if x.dim() != 4 or weights.dim() != 8 or weights.shape[4] != x.shape[1]:
        raise ValueError(
            f"x is {shape(x)} and weights {shape(weights)}; they must be [B, C, H, W] and "
            "[kinds, kinds, U, V, C, P, Q, D]."
        )
    if weights.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and weights {weights.dtype}; they must agree.")
    if min(step) < 1 or any(s > side for s, side in zip(step, weights.shape[2:4], strict=True)):
        raise ValueError(
            f"step is {step}; it must lie between 1 and the window's {tuple(weights.shape[2:4])}."
        )
    cells = [-(-size // s) for size, s in zip(x.shape[2:], step, strict=True)]
    if any(n not in (1, min(count, 3)) for n, count in zip(weights.shape, cells, strict=False)):
        fitting = " and ".join(f"1 or {min(count, 3)}" for count in cells)
        raise ValueError(
            f"weights are of {weights.shape[0]} x {weights.shape[1]} kinds of cells; maps of "
            f"{cells[0]} x {cells[1]} cells have {fitting}."
        )
    D, accurate = weights.shape[-1], wide(x[:0]).dtype
    parameters = {"bias": (bias, D)}
    if head is not None:
        parameters |= {"the head's weight": (head[0], D), "the head's bias": (head[1], 1)}
    for name, (parameter, size) in parameters.items():
        if parameter.shape != (size,) or parameter.dtype != accurate:
            raise ValueError(
                f"{name} is {shape(parameter)} of {parameter.dtype}; it must be [{size}] of "
                f"{accurate}."
            )
    wanted = [x.shape[0], D, *output_size(x, weights, step)]
    if residual is not None and (list(residual.shape) != wanted or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {shape(residual)} of {residual.dtype}; it must be {wanted} of {x.dtype}."
        )
    tensors = [x, weights, bias, residual, *(head or ())]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("an input requires a gradient, which this convolution does not have.")
