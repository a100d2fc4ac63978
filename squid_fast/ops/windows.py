"""The lookup of the windows of maps, for scoring: operator and PyTorch implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import dispatch
from . import lookup
from .common import check_floating, check_top_k, kernels, operator, shape, wide


def _window_lookup_cpu(
    maps: Tensor, slots: Tensor, values: Tensor | None, top_k: int, rows: int, columns: int
) -> Tensor:
    """The answers [B, c, H, W], channels-last, of ``rows`` x ``columns`` windows to a map."""
    (B, c, H, W), (_, N, _, C) = maps.shape, slots.shape
    h, run = H // rows, W // columns * c
    memory = wide(slots).sum(dim=0)
    x = maps.permute(0, 2, 3, 1).reshape(B, rows, h, columns, run)
    query = x.transpose(2, 3).reshape(B, N, C).to(memory.dtype)
    answer = lookup._memory_lookup_cpu(query, memory, values, "gumbel", top_k, 0.0, False)[0]
    if values is not None:
        return answer
    answer = answer.to(maps.dtype).view(B, rows, columns, h, run).transpose(2, 3)
    return answer.reshape(B, H, W, c).contiguous().permute(0, 3, 1, 2)


@operator(_window_lookup_cpu)
def _window_lookup(maps: Tensor, slots: Tensor, values: Tensor | None, *how: Any) -> Tensor:
    if dispatch.serves_window_lookup(maps, slots, how[0]):
        return kernels("window_lookup").forward(maps, slots, values, *how)
    return _window_lookup_cpu(maps, slots, values, *how)


@_window_lookup.register_fake
def _(maps, slots, values, top_k, rows, columns):  # type: ignore[no-untyped-def]
    B, c, H, W = maps.shape
    if values is not None:
        return values.new_empty(B, rows * columns, values.shape[2])
    return maps.new_empty(B, H, W, c).permute(0, 3, 1, 2)


def window_lookup(
    maps: Tensor,
    slots: Tensor,
    top_k: int,
    grid: tuple[int, int] = (1, 1),
    values: Tensor | None = None,
) -> Tensor:
    """``memory_lookup`` of the windows of maps, answered in their places. Paper section 3.2.

    Window (i, j) of every map asks memory ``i * columns + j``, with Gumbel shrinkage. On a GPU,
    maps in channels-last layout are read and written where they lie, and slots of half precision
    multiplied on the matrix units; for scoring alone, there is no gradient.

    Args:
        maps: [B, c, H, W].
        slots: [parts, N, M, C] which add up to the memories, see ``split``: of the maps' dtype, or
            of half precision for maps in float32, which a GPU splits into as many parts. N is
            rows * columns, and C a window's numbers in the order (row, column, channel).
        grid: rows and columns of windows, which divide the maps.
        values: [N, M, V], what is summed in place of the slots, in float32, or in float64 like the
            maps.

    Returns:
        [B, c, H, W] in the maps' dtype, channels-last, or with ``values`` their sums [B, N, V];
        selection and sums are in float32 or wider.

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
    split_here = maps.dtype == torch.float32 and slots.dtype in (torch.bfloat16, torch.float16)
    if slots.dtype != maps.dtype and not split_here:
        raise ValueError(
            f"slots is {slots.dtype} and maps {maps.dtype}; they must agree, or slots be of half "
            "precision and maps torch.float32."
        )
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
    tensors = [maps, slots]
    if values is not None:
        M, dtype = slots.shape[2], torch.promote_types(maps.dtype, torch.float32)
        if values.dim() != 3 or values.shape[:2] != (N, M) or values.dtype != dtype:
            raise ValueError(
                f"values is {shape(values)} of {values.dtype}; [{N}, {M}, V] of {dtype} would fit "
                "these maps and slots."
            )
        tensors.append(values)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "maps, slots or values require a gradient, which this lookup does not have; call it "
            "under torch.no_grad(), or ops.memory_lookup for training."
        )
    return _window_lookup(maps, slots, values, top_k, rows, columns)
