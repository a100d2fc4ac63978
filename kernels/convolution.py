"""Convolutions that make cells of outputs from windows of inputs, channels-last; for scoring.

    sum[P y + p, Q x + q] = Σ weights[u, v, p, q] in[S y + u - 1, T x + v - 1]
    out = relu(sum + bias + residual)        or sigmoid(head · out + head_bias)

P x Q output pixels are a cell. All outputs of a cell are made from one window of input pixels, and
the windows of neighbouring cells lie S rows and T columns apart. That is one product of matrices,
[cells, window] by [window, cell], whose left operand is gathered from the map on its way to the
tensor cores. Two convolutions of the network (paper section 3.1) take this form:

- 3 x 3 with few output channels, in cells of 1 x 2. The 32 channels of one pixel are few columns
  for a product; two pixels share a window of 3 x 4, of which either uses 3 x 3.
- The bilinear resize to twice the side with the 3 x 3 behind it, in cells of 2 x 2. The four
  outputs over a pixel see its 3 x 3 neighbours and nothing else, so that no map is ever resized. At
  the border the resize clamps and the convolution pads with zeros: cells in the first, an inner and
  the last row or column are of different kinds, nine in all, and each kind has its own weights.

Cells of one kind are a rectangle of every image, and a program's tile lies within one rectangle. It
is as square as it can be: neighbouring windows overlap, and find each other's pixels in L1. At the
border, where the rectangles hold few cells, a program takes those of many images.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, card_of, on_device, power_of_2

BLOCK_M = 128  # cells of a program

# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def _stretch(kind, KINDS: tl.constexpr, size, TILE: tl.constexpr):
    """First cell and number of the cells of a kind along an axis of ``size``, and their tile."""
    first, count, tile = 0, size, TILE
    if KINDS > 1:
        inner = (kind > 0) & (kind < KINDS - 1)
        first = tl.where(inner, 1, tl.where(kind == 0, 0, size - 1))
        count, tile = tl.where(inner, size - 2, 1), tl.where(inner, TILE, 1)
    return first, count, tile


@triton.jit
def _tiles(
    kind, B, cells_y, cells_x, KINDS_Y: tl.constexpr, KINDS_X: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """How many tiles the cells of a kind are."""
    _, rows, tile_y = _stretch(kind // KINDS_X, KINDS_Y, cells_y, TILE_Y)
    _, columns, tile_x = _stretch(kind % KINDS_X, KINDS_X, cells_x, TILE_X)
    images = BLOCK_M // (tile_y * tile_x)
    return tl.cdiv(B, images) * tl.cdiv(rows, tile_y) * tl.cdiv(columns, tile_x)


@triton.jit
def _pixels(image, y, x, cell, height, width, CELL_Y: tl.constexpr, CELL_X: tl.constexpr):
    """Places of the cells' pixels in maps of ``height`` x ``width``, and which of them exist."""
    row = (y * CELL_Y)[:, None] + (cell // CELL_X)[None, :]
    column = (x * CELL_X)[:, None] + (cell % CELL_X)[None, :]
    place = (image * height * width)[:, None] + row * width + column
    return place, (row < height) & (column < width)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _cell_convolution_forward_kernel(
    in_ptr, weights_ptr, bias_ptr, residual_ptr, head_weight_ptr, head_bias_ptr, out_ptr,
    B, H, W, cells_y, cells_x, height, width, C: tl.constexpr, D: tl.constexpr,
    KINDS_Y: tl.constexpr, KINDS_X: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RUN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M cells of one kind, BLOCK_N columns of them. Grid: (tiles * blocks of columns,).

    in: [B, H, W, C]; weights: [KINDS_Y, KINDS_X, WINDOW_Y, WINDOW_X, C, CELL_Y, CELL_X, D];
    residual: [B, height, width, D], or None; all dense and of one dtype, float32, bfloat16 or
    float16. bias: float32 [D]. out: as the residual; or, with head_weight float32 [D] and head_bias
    float32 [1], the head's sigmoid, float32 [B, height, width].
    """
    N: tl.constexpr = CELL_Y * CELL_X * D
    ROW: tl.constexpr = WINDOW_X * C  # a row of a window: its pixels lie side by side
    tile = tl.program_id(0) // (N // BLOCK_N)
    n = tl.program_id(0) % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)

    # Tiles are counted kind by kind: this one's comes behind all kinds that end before it.
    kind, end, before = 0, 0, 0
    for other in tl.static_range(KINDS_Y * KINDS_X):
        end += _tiles(other, B, cells_y, cells_x, KINDS_Y, KINDS_X, TILE_Y, TILE_X, BLOCK_M)
        kind += (tile >= end).to(tl.int32)
        before = tl.where(tile >= end, end, before)
    tile -= before
    first_y, rows, tile_y = _stretch(kind // KINDS_X, KINDS_Y, cells_y, TILE_Y)
    first_x, columns, tile_x = _stretch(kind % KINDS_X, KINDS_X, cells_x, TILE_X)

    lane = tl.arange(0, BLOCK_M)
    across, down = tl.cdiv(columns, tile_x), tl.cdiv(rows, tile_y)
    x = tile % across * tile_x + lane % tile_x  # [BLOCK_M]
    y = tile // across % down * tile_y + lane // tile_x % tile_y
    first = tile // (across * down) * (BLOCK_M // (tile_y * tile_x))
    image = lane // (tile_y * tile_x)  # counted from the first
    inside = (first + image < B) & (y < rows) & (x < columns)
    y, x = first_y + y, first_x + x

    top, left = y * STEP_Y - 1, x * STEP_X - 1
    in_ptr += first.to(tl.int64) * (H * W * C)
    window = (((image * H + top) * W + left) * C)[:, None]
    weights_ptrs = weights_ptr + kind * (WINDOW_Y * ROW * N) + n[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(WINDOW_Y * (ROW // BLOCK_K)):
        u = step // (ROW // BLOCK_K)
        k = step % (ROW // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)  # within the window's row
        # k // C, written so that the compiler sees masks, and makes copies, of RUN numbers.
        row, column = top + u, left[:, None] + (k // RUN // (C // RUN))[None, :]
        seen = (inside & (row >= 0) & (row < H))[:, None] & (column >= 0) & (column < W)
        a = tl.load(in_ptr + (window + (u * W * C + k)[None, :]), mask=seen, other=0.0)
        w = tl.load(weights_ptrs + (u * ROW + k)[:, None] * N)
        total = tl.dot(a, w, total, input_precision=PRECISION)

    channel = n % D
    pixels = first.to(tl.int64) * height * width  # before the first image
    place, exists = _pixels(image, y, x, n // D, height, width, CELL_Y, CELL_X)
    exists &= inside[:, None]  # [BLOCK_M, BLOCK_N]
    total += tl.load(bias_ptr + channel)[None, :]
    if residual_ptr is not None:
        residual_ptr += pixels * D
        residual = tl.load(residual_ptr + place * D + channel[None, :], mask=exists, other=0.0)
        total += residual.to(tl.float32)
    total = tl.where(total <= 0, 0.0, total)  # asked this way round, NaN stays NaN
    if head_weight_ptr is None:
        out_ptrs = out_ptr + pixels * D + (place * D + channel[None, :])
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=exists)
    else:
        weighted = total * tl.load(head_weight_ptr + channel)[None, :]
        logits = tl.sum(tl.reshape(weighted, [BLOCK_M, BLOCK_N // D, D]), axis=2)
        logits += tl.load(head_bias_ptr)
        cell = tl.program_id(0) % (N // BLOCK_N) * (BLOCK_N // D) + tl.arange(0, BLOCK_N // D)
        place, exists = _pixels(image, y, x, cell, height, width, CELL_Y, CELL_X)
        tl.store(out_ptr + pixels + place, tl.sigmoid(logits), mask=exists & inside[:, None])


# --- configuration and launchers ------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile of cells within an image, columns, depth of a step, and how much is copied at a time."""

    tile_y: int
    tile_x: int
    block_n: int
    block_k: int
    run: int
    num_warps: int
    num_stages: int

    @staticmethod
    def choose(cells: tuple[int, int], row: int, columns: int, channels: int, card: Card) -> Config:
        """For cells along both axes, the depth of a window's row, and the columns of a cell.

        ``channels`` are those of one output pixel, which a block of columns does not divide.
        """
        # 128 x 128 accumulators are 64 registers a thread of 8 warps; with twice the cells, which
        # would read the weights half as often, the pointers no longer fit beside them.
        block_n = max(min(columns, 128), channels)
        wide = block_n > 64
        # 64 numbers are a cache line, and one or two pixels; a step stays within a window's row.
        block_k = min(row & -row, 64)
        # The windows of 8 x 16 cells see 1.4 times as many pixels, those of 1 x 128 3.1 times.
        tile_x = min(power_of_2(cells[1]), 16)
        tile_y = min(power_of_2(cells[0]), BLOCK_M // tile_x)
        # Three programs side by side, or two wide ones, hide each other's waiting. What shared
        # memory they leave is L1, which has to hold the pixels of their windows, 22 KB each: two
        # steps a program. On sm_90 Triton holds as many as there are stages, before it one fewer.
        stages = 2 if card.is_amd or (card.arch == "sm_90" and not wide) else 3
        # Up to 8 bytes at a time NVIDIA's asynchronous copies go through L1; 16 pass it by, and
        # would read every pixel from L2 as often as there are windows around it.
        run = 8 if card.is_amd else 4
        return Config(tile_y, tile_x, block_n, block_k, run, 8 if wide else 4, stages)

    def tiles(self, B: int, cells: tuple[int, int], kinds: tuple[int, int]) -> int:
        """How many tiles the cells of all kinds are, as ``_tiles`` counts them."""

        def stretches(cells: int, kinds: int, tile: int) -> list[tuple[int, int]]:
            inner = [(cells - 2, tile)] if kinds == 3 else []
            return [(cells, tile)] if kinds == 1 else [(1, 1), *inner, (1, 1)]

        total = 0
        along_y = stretches(cells[0], kinds[0], self.tile_y)
        along_x = stretches(cells[1], kinds[1], self.tile_x)
        for (rows, tile_y), (columns, tile_x) in product(along_y, along_x):
            images = BLOCK_M // (tile_y * tile_x)
            across = triton.cdiv(rows, tile_y) * triton.cdiv(columns, tile_x)
            total += triton.cdiv(B, images) * across
        return total


def forward(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    step: list[int],
    residual: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
) -> Tensor:
    """The operator, of maps [B, C, H, W] of which those in channels-last are not copied."""
    B, C, H, W = x.shape
    kinds_y, kinds_x, window_y, window_x, _, cell_y, cell_x, D = weights.shape
    cells = triton.cdiv(H, step[0]), triton.cdiv(W, step[1])
    height, width = triton.cdiv(H * cell_y, step[0]), triton.cdiv(W * cell_x, step[1])
    columns, card = cell_y * cell_x * D, card_of(x)
    config = Config.choose(cells, window_x * C, columns, D, card)
    programs = config.tiles(B, cells, (kinds_y, kinds_x)) * (columns // config.block_n)
    if head_weight is None:
        out = x.new_empty(B, height, width, D)
        result = out.permute(0, 3, 1, 2)
    else:
        out = x.new_empty(B, height, width, dtype=torch.float32)
        result = out[:, None]
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if head_weight is not None:
        head_weight = head_weight.contiguous()
    with on_device(x):
        _cell_convolution_forward_kernel[(programs,)](
            x, weights.contiguous(), bias.contiguous(), residual, head_weight, head_bias, out,
            B, H, W, *cells, height, width, C=C, D=D,
            KINDS_Y=kinds_y, KINDS_X=kinds_x, WINDOW_Y=window_y, WINDOW_X=window_x,
            CELL_Y=cell_y, CELL_X=cell_x, STEP_Y=step[0], STEP_X=step[1],
            TILE_Y=config.tile_y, TILE_X=config.tile_x,
            BLOCK_M=BLOCK_M, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            RUN=config.run, PRECISION=card.float32_precision,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return result
