"""Bilinear resize of maps to twice their side, behind the channels of a skip, and its adjoint.

    out[2y] = 3/4 x[y] + 1/4 x[y - 1]      grad_x[y] = 1/4 grad[2y - 1] + 3/4 grad[2y]
    out[2y + 1] = 3/4 x[y] + 1/4 x[y + 1]            + 3/4 grad[2y + 1] + 1/4 grad[2y + 2]

along rows and along columns; places outside are those at the border, on both sides. Only bytes
count: four results for every pixel. A program has a rectangle of pixels of x, so that its threads
find each other's neighbours in the L1 cache, and makes the four results of each. The backward
gathers what the forward spread, so that nothing is added atomically.

Maps may have any strides; Triton compiles anew for a stride of 1, and makes loads and stores 16
bytes wide along that axis. Patches are put together by their addresses: the pixel (y, x) of an
image lies in the patch (y // h, x // w), and patches follow one another along the first axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .card import on_device, power_of_2

# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def _pixels(H, W, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """This program's image [] and pixels, y and x [BLOCK_Y * BLOCK_X, 1]."""
    tile = tl.program_id(0)
    columns, rows = tl.cdiv(W, BLOCK_X), tl.cdiv(H, BLOCK_Y)
    place = tl.arange(0, BLOCK_Y * BLOCK_X)[:, None]
    y = tile // columns % rows * BLOCK_Y + place // BLOCK_X
    x = tile % columns * BLOCK_X + place % BLOCK_X
    return (tile // columns // rows).to(tl.int64), y, x


@triton.jit
def _clamped(place, size):
    return tl.minimum(tl.maximum(place, 0), size - 1)


@triton.jit
def _offset(place, stride, size, stride_patch, NUM_PATCH: tl.constexpr):
    """Offset of a row or column, of 64 bits, of an image whose patches have ``size`` of them."""
    if NUM_PATCH == 1:
        return place.to(tl.int64) * stride
    patch, inner = (place // size).to(tl.int64), (place % size).to(tl.int64)
    return patch * stride_patch + inner * stride


@triton.jit
def _load(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _spread(before, here, after):
    """The two results at ``here`` along one axis."""
    return 0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after


@triton.jit
def _spread_row(row_ptr, left, middle, right, inside):
    """The results of a row along its columns, even and odd."""
    before, here, after = row_ptr + left, row_ptr + middle, row_ptr + right
    return _spread(_load(before, inside), _load(here, inside), _load(after, inside))


@triton.jit
def _gather(a, b, c, d):
    """What four gradients along one axis give the place between ``b`` and ``c``."""
    return 0.75 * (b + c) + 0.25 * (a + d)


@triton.jit
def _gather_row(grad_ptr, row, x, H, W, stride_y, stride_x, inside):
    """A row of gradients [2H, 2W], gathered along its columns."""
    row_ptr = grad_ptr + _clamped(row, 2 * H).to(tl.int64) * stride_y
    return _gather(
        _load(row_ptr + _clamped(2 * x - 1, 2 * W).to(tl.int64) * stride_x, inside),
        _load(row_ptr + (2 * x).to(tl.int64) * stride_x, inside),
        _load(row_ptr + (2 * x + 1).to(tl.int64) * stride_x, inside),
        _load(row_ptr + _clamped(2 * x + 2, 2 * W).to(tl.int64) * stride_x, inside),
    )


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _upsample_concat_forward_kernel(
    x_ptr, skip_ptr, out_ptr, H, W, C, S,
    stride_x_b, stride_x_c, stride_x_y, stride_x_x,
    stride_skip_b, stride_skip_c, stride_skip_y, stride_skip_x,
    stride_out_b, stride_out_c, stride_out_y, stride_out_x,
    NUM_PATCH: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x: [B P P, C, H / P, W / P], P = NUM_PATCH. skip: [B, S, 2H, 2W]. out: [B, S + C, 2H, 2W].

    All of one dtype: float32, bfloat16 or float16. Programs of the second axis have a block of
    channels each: the first ones of x, the others, if S is not 0, of the skip.
    """
    image, y, x = _pixels(H, W, BLOCK_Y, BLOCK_X)
    top, side = 2 * y.to(tl.int64), 2 * x.to(tl.int64)
    corner = out_ptr + image * stride_out_b + top * stride_out_y + side * stride_out_x
    blocks = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(1)
    if block < blocks:
        channel = (block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        inside = (y < H) & (x < W) & (channel < C)  # [BLOCK_Y * BLOCK_X, BLOCK_C]
        channel = channel.to(tl.int64)
        source = x_ptr + image * (NUM_PATCH * NUM_PATCH * stride_x_b) + channel * stride_x_c
        target = corner + (S + channel) * stride_out_c
        w, h = W // NUM_PATCH, H // NUM_PATCH
        left = _offset(_clamped(x - 1, W), stride_x_x, w, stride_x_b, NUM_PATCH)
        middle = _offset(x, stride_x_x, w, stride_x_b, NUM_PATCH)
        right = _offset(_clamped(x + 1, W), stride_x_x, w, stride_x_b, NUM_PATCH)
        next_patch = stride_x_b * NUM_PATCH
        above = _offset(_clamped(y - 1, H), stride_x_y, h, next_patch, NUM_PATCH)
        here = _offset(y, stride_x_y, h, next_patch, NUM_PATCH)
        below = _offset(_clamped(y + 1, H), stride_x_y, h, next_patch, NUM_PATCH)
        above0, above1 = _spread_row(source + above, left, middle, right, inside)
        here0, here1 = _spread_row(source + here, left, middle, right, inside)
        # Stored before the row below is loaded: with all nine pixels in registers, some spill.
        out00, out10 = 0.25 * above0 + 0.75 * here0, 0.75 * here0
        out01, out11 = 0.25 * above1 + 0.75 * here1, 0.75 * here1
        dtype = out_ptr.dtype.element_ty
        tl.store(target, out00.to(dtype), mask=inside)
        tl.store(target + stride_out_x, out01.to(dtype), mask=inside)
        below0, below1 = _spread_row(source + below, left, middle, right, inside)
        out10 += 0.25 * below0
        out11 += 0.25 * below1
        tl.store(target + stride_out_y, out10.to(dtype), mask=inside)
        tl.store(target + stride_out_y + stride_out_x, out11.to(dtype), mask=inside)
    elif skip_ptr is not None:
        ahead = ((block - blocks) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        whole = (y < H) & (x < W) & (ahead < S)
        ahead = ahead.to(tl.int64)
        kept = skip_ptr + image * stride_skip_b + ahead * stride_skip_c
        kept += top * stride_skip_y + side * stride_skip_x
        first = corner + ahead * stride_out_c
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                copied = tl.load(
                    kept + (i * stride_skip_y + j * stride_skip_x), mask=whole, other=0.0
                )
                tl.store(first + (i * stride_out_y + j * stride_out_x), copied, mask=whole)


@triton.jit
def _upsample_concat_backward_kernel(
    grad_ptr, grad_x_ptr, H, W, C,
    stride_grad_b, stride_grad_c, stride_grad_y, stride_grad_x,
    stride_x_b, stride_x_c, stride_x_y, stride_x_x,
    NUM_PATCH: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad: [B, C, 2H, 2W], without the skip's channels. grad_x: [B P P, C, H / P, W / P].

    Both of one dtype, as in the forward.
    """
    image, y, x = _pixels(H, W, BLOCK_Y, BLOCK_X)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (y < H) & (x < W) & (channel < C)  # [BLOCK_Y * BLOCK_X, BLOCK_C]
    channel = channel.to(tl.int64)
    source = grad_ptr + image * stride_grad_b + channel * stride_grad_c
    to_y, to_x = stride_grad_y, stride_grad_x
    grad_x = _gather(
        _gather_row(source, 2 * y - 1, x, H, W, to_y, to_x, inside),
        _gather_row(source, 2 * y, x, H, W, to_y, to_x, inside),
        _gather_row(source, 2 * y + 1, x, H, W, to_y, to_x, inside),
        _gather_row(source, 2 * y + 2, x, H, W, to_y, to_x, inside),
    )
    target = grad_x_ptr + image * (NUM_PATCH * NUM_PATCH * stride_x_b) + channel * stride_x_c
    target += _offset(y, stride_x_y, H // NUM_PATCH, stride_x_b * NUM_PATCH, NUM_PATCH)
    target += _offset(x, stride_x_x, W // NUM_PATCH, stride_x_b, NUM_PATCH)
    tl.store(target, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


# --- configuration and launchers ------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Rows, columns and channels of a tile, in pixels of x."""

    BLOCK_Y: int
    BLOCK_X: int
    BLOCK_C: int
    num_warps: int = 4

    @staticmethod
    def choose(H: int, W: int, C: int, channels_last: bool) -> Config:
        """For maps of C channels, H x W pixels, that are to be doubled."""
        # 8 elements a thread are 16 bytes of bfloat16: six or nine such loads in flight, in the
        # backward sixteen.
        elements = 1024
        if channels_last:
            # 64 channels are a whole cache line. Of sixteen pixels, a square has the fewest
            # neighbours: 36 pixels are read, for a row of sixteen 54.
            pixels = elements // min(power_of_2(C), 64)
            block_x = min(power_of_2(W), 1 << pixels.bit_length() // 2)
        else:
            pixels = elements
            block_x = min(power_of_2(W), 64)  # a cache line again
        block_y = min(power_of_2(H), pixels // block_x)
        block_c = min(power_of_2(C), elements // (block_y * block_x))
        # Eight pixels a thread have addresses of their own, and an A100 would spill.
        return Config(block_y, block_x, block_c, num_warps=4 if channels_last else 8)


def _choose(like: Tensor, H: int, W: int, C: int) -> Config:
    """For maps of C channels, H x W pixels, that lie in memory as ``like`` does."""
    return Config.choose(H, W, C, like.stride(1) == 1 < like.stride(3))


def _tiles(B: int, H: int, W: int, config: Config) -> int:
    return B * triton.cdiv(H, config.BLOCK_Y) * triton.cdiv(W, config.BLOCK_X)


def forward(x: Tensor, skip: Tensor | None, num_patch: int, out: Tensor) -> Tensor:
    """Patches [B P P, C, H / P, W / P] and a skip [B, S, 2H, 2W] to ``out`` [B, S + C, 2H, 2W]."""
    C = x.shape[1]
    B, S, H, W = out.shape[0], out.shape[1] - C, out.shape[2] // 2, out.shape[3] // 2
    config = _choose(x, H, W, C)
    blocks = triton.cdiv(C, config.BLOCK_C) + triton.cdiv(S, config.BLOCK_C)
    of_skip = (0, 0, 0, 0) if skip is None else skip.stride()
    with on_device(x):
        _upsample_concat_forward_kernel[_tiles(B, H, W, config), blocks](
            *(x, skip, out, H, W, C, S, *x.stride(), *of_skip, *out.stride()),
            NUM_PATCH=num_patch,
            **vars(config),
        )
    return out


def backward(grad: Tensor, num_patch: int, grad_x: Tensor) -> Tensor:
    """Gradients [B, S + C, 2H, 2W] to ``grad_x`` [B P P, C, H / P, W / P], those of the patches."""
    C = grad_x.shape[1]
    grad = grad[:, grad.shape[1] - C :]
    B, H, W = grad.shape[0], grad.shape[2] // 2, grad.shape[3] // 2
    config = _choose(grad, H, W, C)
    blocks = triton.cdiv(C, config.BLOCK_C)
    with on_device(grad):
        _upsample_concat_backward_kernel[_tiles(B, H, W, config), blocks](
            *(grad, grad_x, H, W, C, *grad.stride(), *grad_x.stride()),
            NUM_PATCH=num_patch,
            **vars(config),
        )
    return grad_x
