"""The lookup of the windows of maps, for scoring: operator and PyTorch implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import dispatch
from . import lookup
from .common import check_floating, check_top_k, kernels, operator, shape, wide


def _window_lookup_cpu(maps: Tensor, slots: Tensor, top_k: int, rows: int, columns: int) -> Tensor:
    """The answers [B, c, H, W], channels-last, of ``rows`` x ``columns`` windows to a map."""
    (B, c, H, W), (_, N, _, C) = maps.shape, slots.shape
    h, run = H // rows, W // columns * c
    memory = wide(slots).sum(dim=0)
    x = maps.permute(0, 2, 3, 1).reshape(B, rows, h, columns, run)
    query = x.transpose(2, 3).reshape(B, N, C).to(memory.dtype)
    answer = lookup._memory_lookup_cpu(query, memory, None, "gumbel", top_k, 0.0, False)[0]
    answer = answer.to(maps.dtype).view(B, rows, columns, h, run).transpose(2, 3)
    return answer.reshape(B, H, W, c).contiguous().permute(0, 3, 1, 2)


@operator(_window_lookup_cpu)
def _window_lookup(maps: Tensor, slots: Tensor, top_k: int, *grid: Any) -> Tensor:
    if dispatch.serves_window_lookup(maps, slots, top_k):
        return kernels("window_lookup").forward(maps, slots, top_k, *grid)
    return _window_lookup_cpu(maps, slots, top_k, *grid)


@_window_lookup.register_fake
def _(maps, slots, top_k, rows, columns):  # type: ignore[no-untyped-def]
    B, c, H, W = maps.shape
    return maps.new_empty(B, H, W, c).permute(0, 3, 1, 2)


def window_lookup(
    maps: Tensor, slots: Tensor, top_k: int, grid: tuple[int, int] = (1, 1)
) -> Tensor:
    """``memory_lookup`` of the windows of maps, answered in their places. Paper section 3.2.

    Window (i, j) of every map asks memory ``i * columns + j``, with Gumbel shrinkage. On a GPU,
    maps of half precision in channels-last layout are read and written where they lie; for scoring
    alone, there is no gradient.

    Args:
        maps: [B, c, H, W].
        slots: [parts, N, M, C] of the maps' dtype, which add up to the memories, see ``split``;
            N is rows * columns, and C a window's numbers in the order (row,
            column, channel).
        grid: rows and columns of windows, which divide the maps.

    Returns:
        [B, c, H, W] in the maps' dtype, channels-last; selection and sums are in float32 or wider.

    Raises:
        ValueError: shapes or dtypes do not fit, ``top_k`` is out of range, or a gradient is asked
            for.

    >>> maps = torch.tensor([0.9, 0.1, 0.2, 0.8]).view(1, 1, 1, 4)  # windows of 1 x 2
    >>> slots = torch.eye(2).expand(1, 2, 2, 2)
    >>> window_lookup(maps, slots, top_k=2, grid=(1, 2))
    tensor([[[[1., 0., 0., 1.]]]])
    """
    if maps.dim() != 4 or slots.dim() != 4:
        raise ValueError(
            f"maps is {shape(maps)} and slots {shape(slots)}; they must be [B, c, H, W] and "
            "[parts, N, M, C]."
        )
    check_floating("maps", maps)
    if slots.dtype != maps.dtype:
        raise ValueError(f"slots is {slots.dtype} and maps {maps.dtype}; they must agree.")
    (_, c, H, W), (rows, columns) = maps.shape, grid
    if rows < 1 or columns < 1 or H % rows or W % columns:
        raise ValueError(f"grid is {rows} x {columns}; it must divide maps of {H} x {W}.")
    N, C = rows * columns, H // rows * (W // columns) * c
    if slots.shape[0] < 1 or slots.shape[1] != N or slots.shape[3] != C:
        raise ValueError(
            f"slots is {shape(slots)}; [parts, {N}, M, {C}] would fit {rows} x {columns} windows "
            f"of maps {shape(maps)}."
        )
    check_top_k(top_k, slots.shape[2])
    if torch.is_grad_enabled() and (maps.requires_grad or slots.requires_grad):
        raise ValueError(
            "maps or slots require a gradient, which this lookup does not have; call it under "
            "torch.no_grad(), or ops.memory_lookup for training."
        )
    return _window_lookup(maps, slots, top_k, rows, columns)
