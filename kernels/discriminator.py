"""The discriminator's score of images (paper section 3.4): one kernel for each convolution.

    layer(x) = leaky(norm(conv(x)))    conv: 5 x 5, stride 2    score = regressor . x + bias

The norm, of every image by its own statistics, follows all convolutions but the first; without it,
a bias takes its place. A program computes a block of channels for all places of an image, so that
it knows the statistics when it has the sums, and the last layer's program the whole score.

Half precision alone would move scores, and tensor cores take no float32. So maps and weights are
sums of two float16 numbers, high and low, which hold 22 bits, and three products make up one:
high high + high low + low high. Maps are kept that way, [B, H, W, 2, C], in as many bytes as
float32, since splitting them where they are read would do it six times over. Every output channel
of the weights is scaled by a power of two, which keeps its low parts clear of float16's smallest
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import Card, card_of, on_device, power_of_2

SLOPE = tl.constexpr(0.2)  # of the leaky ReLU
TAPS = tl.constexpr(25)

# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def _leaky(x):
    return tl.where(x < 0, SLOPE * x, x)  # asked this way round, NaN stays NaN


@triton.jit
def _store_split(out_ptr, at, x, N, mask):
    """Write x [ROWS, BLOCK_N] as two float16 numbers, the low one N places behind the high one."""
    high = x.to(tl.float16)
    tl.store(out_ptr + at, high, mask=mask)
    tl.store(out_ptr + at + N, (x - high.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit
def _rows(ROWS: tl.constexpr, first_image, block, BLOCK_P: tl.constexpr):
    """Image and place of rows of a tile, which has BLOCK_P rows for every image."""
    row = tl.arange(0, ROWS)
    return first_image + row // BLOCK_P, block * BLOCK_P + row % BLOCK_P


@triton.jit
def _convolve(
    x_ptr, weight_ptr, first_image, block, channel, B, H, W, H_OUT, W_OUT, N,
    C: tl.constexpr, IMAGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums [IMAGES, BLOCK_P, BLOCK_N] over windows of a map, times weights."""
    ROWS: tl.constexpr = IMAGES * BLOCK_P
    image, place = _rows(ROWS, first_image, block, BLOCK_P)
    inside = (image < B) & (place < H_OUT * W_OUT)
    top, left = 2 * (place // W_OUT) - 2, 2 * (place % W_OUT) - 2
    x_ptrs = x_ptr + (image * (H * W) + (top * W + left)) * (2 * C)
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for step in range(tl.cdiv(TAPS * C, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)  # counts taps, and channels within a tap
        down, right = k // C // 5, k // C % 5
        y, x = top[:, None] + down[None, :], left[:, None] + right[None, :]
        on_map = (y >= 0) & (y < H) & (x >= 0) & (x < W)
        mask = inside[:, None] & on_map & (k < TAPS * C)[None, :]  # [ROWS, BLOCK_K]
        at = x_ptrs[:, None] + ((down * W + right) * (2 * C) + k % C)[None, :]
        x_high = tl.load(at, mask=mask, other=0.0)
        x_low = tl.load(at + C, mask=mask, other=0.0)
        weights = weight_ptr + k[:, None] * N + channel[None, :]  # [BLOCK_K, BLOCK_N]
        mask = (k < TAPS * C)[:, None] & (channel < N)[None, :]
        weight_high = tl.load(weights, mask=mask, other=0.0)
        weight_low = tl.load(weights + TAPS * C * N, mask=mask, other=0.0)
        total = tl.dot(x_low, weight_high, total)
        total = tl.dot(x_high, weight_low, total)
        total = tl.dot(x_high, weight_high, total)
    return total.reshape([IMAGES, BLOCK_P, BLOCK_N])


@triton.jit
def _moments(x, block, places):
    """Mean, and sum of squared distances from it, [IMAGES, 1, C] each, of a block's places."""
    count = tl.minimum(places - block * x.shape[1], x.shape[1])
    inside = (tl.arange(0, x.shape[1]) < count)[None, :, None]
    mean = tl.sum(tl.where(inside, x, 0.0), axis=1, keep_dims=True) / count
    distance = tl.where(inside, x - mean, 0.0)
    return mean, tl.sum(distance * distance, axis=1, keep_dims=True)


@triton.jit
def _add_moments(mean, squares, seen, block_mean, block_squares, count):
    """The moments of two sets of numbers together (Chan, Golub & LeVeque 1979)."""
    distance, share = block_mean - mean, count.to(tl.float32) / (seen + count)
    return mean + distance * share, squares + block_squares + distance * distance * (seen * share)


@triton.jit
def _finish(
    x, mean, squares, power_ptr, scale_ptr, shift_ptr, out_ptr, regressor_ptr, first_image, block,
    channel, B, places, N, EPS: tl.constexpr,
):  # fmt: skip
    """Norm and leaky ReLU of a block [IMAGES, BLOCK_P, BLOCK_N], which is stored.

    Of the last layer it is not: returned is what it adds to the scores [IMAGES], else 0.
    """
    IMAGES: tl.constexpr = x.shape[0]
    BLOCK_P: tl.constexpr = x.shape[1]
    factor = tl.load(power_ptr + channel, mask=channel < N, other=1.0)[None, None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=channel < N, other=0.0)[None, None, :]
        factor *= scale * tl.rsqrt(squares * (factor * factor) / places + EPS)
    shift = tl.load(shift_ptr + channel, mask=channel < N, other=0.0)[None, None, :]
    x = _leaky((x - mean) * factor + shift)
    if regressor_ptr is not None:
        place = block * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (place < places)[:, None] & (channel < N)[None, :]
        at = place[:, None] * N + channel[None, :]
        regressor = tl.load(regressor_ptr + at, mask=mask, other=0.0)[None, :, :]
        return tl.sum(tl.sum(x * regressor, axis=2), axis=1)
    image, place = _rows(IMAGES * BLOCK_P, first_image, block, BLOCK_P)
    at = (image * places + place)[:, None] * (2 * N) + channel[None, :]
    inside = ((image < B) & (place < places))[:, None] & (channel < N)[None, :]
    _store_split(out_ptr, at, x.reshape([IMAGES * BLOCK_P, x.shape[2]]), N, inside)
    return tl.zeros([IMAGES], tl.float32)


@triton.jit
def _finish_in_halves(
    x, mean, squares, power_ptr, scale_ptr, shift_ptr, out_ptr, regressor_ptr, first_image, block,
    channel, B, places, N, EPS: tl.constexpr,
):  # fmt: skip
    """The same, of large blocks by halves: a store lays its numbers out anew, in registers."""
    HALVES: tl.constexpr = [2, 1, x.shape[1] // 2, x.shape[2]]
    if x.shape[0] == 1 and x.shape[1] >= 256:
        upper, lower = x.reshape(HALVES).permute(1, 2, 3, 0).split()
        score = _finish(
            upper, mean, squares, power_ptr, scale_ptr, shift_ptr, out_ptr, regressor_ptr,
            first_image, 2 * block, channel, B, places, N, EPS,
        )  # fmt: skip
        score += _finish(
            lower, mean, squares, power_ptr, scale_ptr, shift_ptr, out_ptr, regressor_ptr,
            first_image, 2 * block + 1, channel, B, places, N, EPS,
        )  # fmt: skip
    else:
        score = _finish(
            x, mean, squares, power_ptr, scale_ptr, shift_ptr, out_ptr, regressor_ptr, first_image,
            block, channel, B, places, N, EPS,
        )  # fmt: skip
    return score


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _first_layer_kernel(
    images_ptr, stride_images_b, stride_images_h, stride_images_w, weight_ptr, bias_ptr, out_ptr,
    B, H, W, H_OUT, W_OUT, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """leaky(conv(images)) of one channel, in float32. Grid: (blocks of places of all images).

    images: [B, H, W] of any floating dtype and strides. weight: float32 [25, N]. bias: float32 [N].
    out: float16 [B, H_OUT, W_OUT, 2, N].
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_N)
    image, place = row // (H_OUT * W_OUT), (row % (H_OUT * W_OUT)).to(tl.int32)
    top, left = 2 * (place // W_OUT) - 2, 2 * (place % W_OUT) - 2
    images_ptrs = images_ptr + image * stride_images_b
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    total += tl.load(bias_ptr + channel, mask=channel < N, other=0.0)[None, :]
    for tap in tl.static_range(TAPS):
        y, x = top + tap // 5, left + tap % 5
        mask = (image < B) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        at = y.to(tl.int64) * stride_images_h + x * stride_images_w
        pixel = tl.load(images_ptrs + at, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + tap * N + channel, mask=channel < N, other=0.0)
        total += pixel[:, None] * weight[None, :]
    at = row[:, None] * (2 * N) + channel[None, :]
    mask = (image < B)[:, None] & (channel < N)[None, :]
    _store_split(out_ptr, at, _leaky(total), N, mask)


@triton.jit
def _layer_kernel(
    x_ptr, weight_ptr, power_ptr, scale_ptr, shift_ptr, out_ptr, regressor_ptr, bias_ptr,
    B, H, W, H_OUT, W_OUT, N, blocks,
    C: tl.constexpr, EPS: tl.constexpr, WHOLE: tl.constexpr,
    IMAGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """leaky(norm(conv(x))), or of the last layer the scores. Grid: (images, channels, blocks).

    x: float16 [B, H, W, 2, C]. weight: float16 [2, 25 C, N], whose sums are those of the
    convolution times power: float32 [N]. scale, shift: float32 [N], the norm's; without a norm
    scale is None and shift the bias. out: float16 [B, H_OUT, W_OUT, 2, N]; or, where there is a
    regressor, float32 [H_OUT W_OUT, N], with its bias [1], float32 [B].
    WHOLE: a block of BLOCK_P places is a whole map. Otherwise a map has so many blocks, and with a
    norm a program goes through them twice, to know the statistics and then again.
    """
    first = tl.program_id(0).to(tl.int64) * IMAGES
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = H_OUT * W_OUT
    mean = tl.zeros([IMAGES, 1, BLOCK_N], tl.float32)
    squares = tl.zeros([IMAGES, 1, BLOCK_N], tl.float32)
    score = tl.zeros([IMAGES], tl.float32)
    if WHOLE:
        x = _convolve(
            x_ptr, weight_ptr, first, 0, channel, B, H, W, H_OUT, W_OUT, N,
            C, IMAGES, BLOCK_P, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if scale_ptr is not None:
            mean, squares = _moments(x, 0, places)
        score = _finish_in_halves(
            x, mean, squares, power_ptr, scale_ptr, shift_ptr, out_ptr, regressor_ptr, first, 0,
            channel, B, places, N, EPS,
        )  # fmt: skip
    else:
        if scale_ptr is not None:
            for block in range(blocks):
                x = _convolve(
                    x_ptr, weight_ptr, first, block, channel, B, H, W, H_OUT, W_OUT, N,
                    C, IMAGES, BLOCK_P, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                block_mean, block_squares = _moments(x, block, places)
                seen = block * BLOCK_P
                count = tl.minimum(places - seen, BLOCK_P)
                mean, squares = _add_moments(mean, squares, seen, block_mean, block_squares, count)
        for block in range(tl.program_id(2), blocks, tl.num_programs(2)):
            x = _convolve(
                x_ptr, weight_ptr, first, block, channel, B, H, W, H_OUT, W_OUT, N,
                C, IMAGES, BLOCK_P, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            score += _finish_in_halves(
                x, mean, squares, power_ptr, scale_ptr, shift_ptr, out_ptr, regressor_ptr, first,
                block, channel, B, places, N, EPS,
            )  # fmt: skip
    if regressor_ptr is not None:
        image = first + tl.arange(0, IMAGES)
        tl.store(out_ptr + image, score + tl.load(bias_ptr), mask=image < B)


# --- configuration and launchers ------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile of a layer, and how many blocks of places a map is cut into."""

    images: int
    block_p: int
    block_n: int
    block_k: int
    blocks: int
    num_warps: int
    num_stages: int

    @staticmethod
    def choose(B: int, places: int, N: int, last: bool, card: Card) -> Config:
        """For maps of so many places and N channels, of the last layer or not.

        The last layer's programs have all channels, since they make the whole score.
        """
        # 16384 sums are 64 registers a thread of 8 warps, and twice as many of 32 channels fit, if
        # the map is one block, which it has to fill where no warpgroups multiply. Of 1024 rows,
        # three stages of 16 numbers, both parts of them, fit the shared memory of an H100; an
        # MI300X has a third of that.
        block_n = max(power_of_2(N), 16)
        block_p = min(power_of_2(places), 512 if card.is_amd else 1024)
        if last:
            block_p = min(block_p, 16384 // block_n)
        else:
            twice = places == block_p or (places < block_p and card.arch == "sm_90")
            block_n = min(block_n, max(16384 // block_p, 32 if twice else 16))
        # While there is a multiprocessor for every image, a program takes one. Beyond, it has 64
        # rows at least, which warpgroups multiply at once; 128, which halves the reading of
        # weights, if that leaves most multiprocessors a program. Tensor cores take 16 rows at once.
        images = max(16 // block_p, 1)
        if card.multiprocessors < B:
            images = max(64 // block_p, 1)
            programs = triton.cdiv(B, 2 * images)
            if images * block_p < 128 and 4 * programs > 3 * card.multiprocessors:
                images *= 2
        if not last:
            programs = triton.cdiv(B, images) * triton.cdiv(N, block_n)
            while block_n > 16 and 2 * programs <= card.multiprocessors:
                block_n, programs = block_n // 2, 2 * programs
        rows = images * block_p
        block_k = 64 if rows <= 64 else 32 if rows <= 256 else 16
        stage = 4 * (rows + block_n) * block_k  # bytes
        # Triton keeps one stage in registers, but for warpgroups.
        stages = 2 if card.is_amd else card.shared_memory // stage + (card.arch != "sm_90")
        warps = 8 if rows * block_n > 8192 else 4
        blocks = triton.cdiv(places, block_p)
        return Config(images, block_p, block_n, block_k, blocks, warps, min(stages, 3))


def forward(
    images: Tensor,
    biases: Sequence[Tensor],
    scales: Sequence[Tensor],
    regressor_bias: Tensor,
    packed: Sequence[Tensor],
    eps: float,
) -> Tensor:
    """Scores [B] in float32 of images [B, 1, H, W], with what ``ops.pack_discriminator`` returns.

    biases: float32, one for each layer, of its norm where it has one. scales: of the norms, none
    or one for each layer but the first.
    """
    B, _, H, W = images.shape
    first, *layers, regressor = packed
    half_h, half_w = (H + 1) // 2, (W + 1) // 2
    N = first.shape[1]
    x = first.new_empty((B, half_h, half_w, 2, N), dtype=torch.float16)
    block_n = max(power_of_2(N), 16)
    block_p = 4096 // block_n
    strides = images.stride(0), images.stride(2), images.stride(3)
    biases, scales = ([x.contiguous() for x in of_all] for of_all in (biases, scales))
    with on_device(images):
        _first_layer_kernel[(triton.cdiv(B * half_h * half_w, block_p),)](
            images, *strides, first, biases[0], x, B, H, W, half_h, half_w, N,
            BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
        for i, (weight, power) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
            last = i == len(biases) - 2
            scale = scales[i] if scales else None
            x = _layer(x, weight, power, scale, biases[i + 1], regressor, regressor_bias, last, eps)
    return x


def _layer(
    x: Tensor,
    weight: Tensor,
    power: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    regressor: Tensor,
    bias: Tensor,
    last: bool,
    eps: float,
) -> Tensor:
    B, H, W, _, C = x.shape
    N, (half_h, half_w) = weight.shape[2], ((H + 1) // 2, (W + 1) // 2)
    config = Config.choose(B, half_h * half_w, N, last, card_of(x))
    out = power.new_empty(B) if last else x.new_empty((B, half_h, half_w, 2, N))
    # With a norm, or a score to add up, a program goes through all blocks itself.
    spread = config.blocks if scale is None and not last else 1
    grid = triton.cdiv(B, config.images), triton.cdiv(N, config.block_n), spread
    _layer_kernel[grid](
        x, weight, power, scale, shift, out, regressor if last else None, bias,
        B, H, W, half_h, half_w, N, config.blocks, C=C, EPS=eps, WHOLE=config.blocks == 1,
        IMAGES=config.images, BLOCK_P=config.block_p, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
