"""Batch norm in training of maps [B, C, H, W], with residual and activation, forward and backward.

    y = act(weight (x - mean) rstd + bias + residual)       act = ReLU, LeakyReLU or nothing
    g = act'(y) grad    normed = (x - mean) rstd            n = B H W values a channel
    grad_x = weight rstd (g - sum g / n - normed sum (g normed) / n)
    grad_bias = sum g    grad_weight = sum (g normed)    grad_residual = g

Only bytes count. The forward reads x twice (statistics, then y), the backward reads grad and x
twice. Every program sees a part of the positions and leaves its mean and M2, the sum of squared
differences from it, which are merged as Chan et al. (1979) do: a sum of squares minus the square
of the sum would cancel. The launch that merges also moves the running statistics. The sign of y is
not stored: without a residual it follows from x, with one it is that of y, which the next layer
keeps anyway, and g is written once, being the residual's gradient. No atomics: the same bits every
time. Maps are seen as [B, C, S], S = H W, either channels-last or contiguous, all of a call alike.

Of small maps bytes do not count, but launches. One program sees all positions of a few channels,
and does by itself what follows from sums over them: statistics take one launch instead of two, a
backward one instead of three.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import card_of, on_device, power_of_2
from .tiles import map_at

MOST_PARTS = 512  # parts of the positions, which one program merges
FEW = 4096  # positions that one program goes through by itself

# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def _of_channels(ptr, channel, C):
    """A float32 vector's values [1, BLOCK_C] for these channels."""
    return tl.load(ptr + channel, mask=channel < C, other=0.0)


@triton.jit
def _merge(count, mean, m2):
    """Mean and M2 [1, BLOCK_C] of all groups, given those of each along axis 0."""
    overall = (tl.sum(count * mean, axis=0) / tl.sum(count, axis=0))[None, :]
    apart = mean - overall
    return overall, tl.sum(m2 + count * apart * apart, axis=0)[None, :]


@triton.jit
def _activate(z, SLOPE: tl.constexpr):
    """LeakyReLU of that slope; asked this way round, NaN stays NaN and 0 times infinity is not."""
    if SLOPE == 0.0:
        z = tl.where(z <= 0, 0.0, z)
    elif SLOPE != 1.0:
        z = tl.where(z > 0, z, z * SLOPE)
    return z


@triton.jit
def _through(grad, z, SLOPE: tl.constexpr):
    """The gradient of what the activation is given, from its sign and the gradient behind it."""
    if SLOPE == 0.0:
        grad = tl.where(z > 0, grad, 0.0)
    elif SLOPE != 1.0:
        grad = tl.where(z > 0, grad, grad * SLOPE)
    return grad


@triton.jit
def _moments(
    x_ptr, first, channel, positions, S, C, stride_b, stride_c, stride_s, steps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and M2 [1, BLOCK_C] of ``steps`` tiles of positions, ``first`` [BLOCK_S] the first.

    Every place of the tile has a mean and an M2 of its own (Welford 1962), so that nothing is
    summed across threads before the end.
    """
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for step in range(steps):
        position = first + step * BLOCK_S
        inside = (position < positions)[:, None] & (channel < C)  # [BLOCK_S, BLOCK_C]
        at = map_at(position, channel, S, stride_b, stride_c, stride_s)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        change = tl.where(inside, x - mean, 0.0)
        mean += change * (1.0 / (step + 1))
        m2 += change * (x - mean)
    # What lies inside comes first, so a place has seen either every step or all but its last ones.
    seen = tl.minimum(tl.maximum(tl.cdiv(positions - first, BLOCK_S), 0), steps)
    return _merge(seen.to(tl.float32)[:, None], mean, m2)


@triton.jit
def _finish(
    mean, m2, block, channel, positions, C,
    shift_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Write the statistics and move the running ones, given mean and M2 of all positions.

    shift, or None, mean, rstd, running_mean, running_var, or None: float32 [C]. tracked: int64 [],
    counted up by the first block of channels; not with MOMENTUM None, where it must include this
    batch already, since every program reads it.
    """
    tl.store(mean_ptr + channel, mean, mask=channel < C)
    tl.store(rstd_ptr + channel, 1.0 / tl.sqrt(m2 / positions + EPS), mask=channel < C)
    if running_mean_ptr is not None:
        if shift_ptr is not None:
            mean += _of_channels(shift_ptr, channel, C)
        running_mean = _of_channels(running_mean_ptr, channel, C)
        running_var = _of_channels(running_var_ptr, channel, C)
        tracked = tl.load(tracked_ptr)
        if MOMENTUM is None:
            share = 1.0 / tracked.to(tl.float32)
        else:
            share = MOMENTUM
            if block == 0:
                tl.store(tracked_ptr, tracked + 1)
        running_mean += share * (mean - running_mean)
        running_var += share * (m2 / (positions - 1) - running_var)
        tl.store(running_mean_ptr + channel, running_mean, mask=channel < C)
        tl.store(running_var_ptr + channel, running_var, mask=channel < C)


@triton.jit
def _behind_statistics(
    grad_ptr, x_ptr, y_ptr, at, inside, mean, scale, bias, SLOPE: tl.constexpr
):  # fmt: skip
    """g and x - mean of a tile; the sign of y is that of ``y_ptr`` or follows from x."""
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean
    if y_ptr is None:
        g = _through(g, centred * scale + bias, SLOPE)
    else:
        y = tl.load(y_ptr + at, mask=inside, other=0.0)
        g = _through(g, y.to(tl.float32), SLOPE)
    return g, centred


@triton.jit
def _input_gradient(g, centred, scale, rstd, sum_g, sum_g_normed, positions):
    """The gradient of x, in float32, given sums over all positions."""
    share = 1.0 / positions
    return scale * (g - sum_g * share - centred * (rstd * (sum_g_normed * share)))


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _batch_norm_statistics_kernel(
    x_ptr, partial_ptr, shift_ptr, mean_ptr, rstd_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr,
    positions, S, C, stride_b, stride_c, stride_s, steps,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x: [B, C, S] float32, bfloat16 or float16. partial: float32 [2, parts, C], mean and M2.

    positions: B S, of which a part is ``steps`` tiles. With partial None the only part is all, and
    its statistics are written; the other pointers are those of ``_finish``.
    """
    first = tl.program_id(0) * steps * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mean, m2 = _moments(
        x_ptr, first, channel, positions, S, C, stride_b, stride_c, stride_s, steps,
        BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if partial_ptr is None:
        _finish(
            mean, m2, tl.program_id(1), channel, positions, C,
            shift_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
            EPS, MOMENTUM,
        )  # fmt: skip
    else:
        to_mean = tl.program_id(0).to(tl.int64) * C + channel
        to_m2 = to_mean + tl.num_programs(0).to(tl.int64) * C
        tl.store(partial_ptr + to_mean, mean, mask=channel < C)
        tl.store(partial_ptr + to_m2, m2, mask=channel < C)


@triton.jit
def _batch_norm_merge_kernel(
    partial_ptr, shift_ptr, mean_ptr, rstd_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr, positions, per_part, parts, C,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial: float32 [2, parts, C], mean and M2 of ``per_part`` positions, the last of the rest.

    The other pointers are those of ``_finish``.
    """
    part = tl.arange(0, BLOCK_P)[:, None]
    channel = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (part < parts) & (channel < C)  # [BLOCK_P, BLOCK_C]
    at = part * C + channel
    count = tl.minimum(tl.maximum(positions - part * per_part, 0), per_part).to(tl.float32)
    mean = tl.load(partial_ptr + at, mask=inside, other=0.0)
    m2 = tl.load(partial_ptr + parts * C + at, mask=inside, other=0.0)
    mean, m2 = _merge(count, mean, m2)
    _finish(
        mean, m2, tl.program_id(0), channel, positions, C,
        shift_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
        EPS, MOMENTUM,
    )  # fmt: skip


@triton.jit
def _batch_norm_forward_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    positions, S, C, stride_b, stride_c, stride_s,
    SLOPE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x, residual, or None, y: [B, C, S] of one dtype: float32, bfloat16 or float16.

    mean, rstd, weight, bias: float32 [C].
    """
    position = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (position < positions)[:, None] & (channel < C)  # [BLOCK_S, BLOCK_C]
    at = map_at(position, channel, S, stride_b, stride_c, stride_s)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    scale = _of_channels(rstd_ptr, channel, C) * _of_channels(weight_ptr, channel, C)
    z = (x.to(tl.float32) - _of_channels(mean_ptr, channel, C)) * scale
    z += _of_channels(bias_ptr, channel, C)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, _activate(z, SLOPE).to(x.dtype), mask=inside)


@triton.jit
def _batch_norm_backward_sums_kernel(
    grad_ptr, x_ptr, y_ptr, grad_residual_ptr, grad_x_ptr, sums_g_ptr, sums_g_normed_ptr,
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    positions, S, C, stride_b, stride_c, stride_s, steps,
    SLOPE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g normed over a part of the positions, float32 [parts, C] each.

    grad, x, y, grad_residual, grad_x: [B, C, S] of one dtype, as in the forward; y and
    grad_residual are None where nothing was added. With grad_x the only part is all, and that is
    written too; else it is None. mean, rstd, weight, bias: float32 [C].
    """
    first = tl.program_id(0) * steps * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mean, rstd = _of_channels(mean_ptr, channel, C), _of_channels(rstd_ptr, channel, C)
    scale = rstd * _of_channels(weight_ptr, channel, C)
    bias = _of_channels(bias_ptr, channel, C)
    sum_g = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_g_centred = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for step in range(steps):
        position = first + step * BLOCK_S
        inside = (position < positions)[:, None] & (channel < C)  # [BLOCK_S, BLOCK_C]
        at = map_at(position, channel, S, stride_b, stride_c, stride_s)
        g, centred = _behind_statistics(
            grad_ptr, x_ptr, y_ptr, at, inside, mean, scale, bias, SLOPE
        )  # fmt: skip
        if y_ptr is not None:
            tl.store(grad_residual_ptr + at, g, mask=inside)
        sum_g += g
        sum_g_centred += g * centred
    all_g = tl.sum(sum_g, axis=0)[None, :]
    all_g_normed = tl.sum(sum_g_centred, axis=0)[None, :] * rstd
    to = tl.program_id(0).to(tl.int64) * C + channel
    tl.store(sums_g_ptr + to, all_g, mask=channel < C)
    tl.store(sums_g_normed_ptr + to, all_g_normed, mask=channel < C)
    if grad_x_ptr is not None:
        for step in range(steps):
            position = first + step * BLOCK_S
            inside = (position < positions)[:, None] & (channel < C)
            at = map_at(position, channel, S, stride_b, stride_c, stride_s)
            g, centred = _behind_statistics(
                grad_ptr, x_ptr, y_ptr, at, inside, mean, scale, bias, SLOPE
            )  # fmt: skip
            grad_x = _input_gradient(g, centred, scale, rstd, all_g, all_g_normed, positions)
            tl.store(grad_x_ptr + at, grad_x, mask=inside)


@triton.jit
def _batch_norm_backward_kernel(
    grad_ptr, x_ptr, grad_x_ptr, sums_ptr, grad_weight_ptr, grad_bias_ptr,
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    positions, S, C, stride_b, stride_c, stride_s,
    SLOPE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad, x, grad_x: [B, C, S] of one dtype, as in the forward. With SLOPE 1 grad is taken for g.

    sums: float32 [2, C], of g and of g normed, which are copied to grad_bias and grad_weight, since
    results may not share memory. These, mean, rstd, weight, bias: float32 [C].
    """
    position = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (position < positions)[:, None] & (channel < C)  # [BLOCK_S, BLOCK_C]
    at = map_at(position, channel, S, stride_b, stride_c, stride_s)
    mean, rstd = _of_channels(mean_ptr, channel, C), _of_channels(rstd_ptr, channel, C)
    scale = rstd * _of_channels(weight_ptr, channel, C)
    bias = _of_channels(bias_ptr, channel, C)
    g, centred = _behind_statistics(grad_ptr, x_ptr, None, at, inside, mean, scale, bias, SLOPE)
    sum_g = _of_channels(sums_ptr, channel, C)
    sum_g_normed = _of_channels(sums_ptr + C, channel, C)
    if tl.program_id(0) == 0:
        tl.store(grad_bias_ptr + channel, sum_g, mask=channel < C)
        tl.store(grad_weight_ptr + channel, sum_g_normed, mask=channel < C)
    grad_x = _input_gradient(g, centred, scale, rstd, sum_g, sum_g_normed, positions)
    tl.store(grad_x_ptr + at, grad_x, mask=inside)


# --- configuration and launchers ------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Positions and channels of a tile, and the number of parts and of their tiles in sums."""

    block_s: int
    block_c: int
    parts: int
    steps: int
    num_warps: int = 4

    @staticmethod
    def choose(x: Tensor, per_thread: int = 32) -> Config:
        """For a map [B, C, S] and tiles of at most so many elements a thread."""
        B, C, S = x.shape
        # As in the masked shortcut: 32 elements a thread, and whole cache lines along either axis.
        block_c = min(power_of_2(C), 64)
        block_s = min(power_of_2(B * S), 128 * per_thread // block_c)
        tiles, blocks_c = triton.cdiv(B * S, block_s), triton.cdiv(C, block_c)
        # Four programs a multiprocessor have enough loads in flight; more would be more to merge.
        wanted = max(4 * card_of(x).multiprocessors // blocks_c, 1)
        steps = triton.cdiv(tiles, min(wanted, MOST_PARTS))
        return Config(block_s, block_c, triton.cdiv(tiles, steps), steps)

    @staticmethod
    def of_sums(x: Tensor, per_thread: int = 32) -> Config:
        """For sums over all positions, which are one part where they are few."""
        B, C, S = x.shape
        if B * S > FEW:
            return Config.choose(x, per_thread)
        # Eight channels of half precision are one load of a thread. A tile of 512 threads keeps
        # 32 KB of them in flight, and few tiles one after the other are soon through.
        block_c = min(power_of_2(C), 8)
        block_s = min(power_of_2(B * S), 512 * per_thread // block_c)
        warps = max(block_s * block_c // (32 * per_thread), 1)
        return Config(block_s, block_c, 1, triton.cdiv(B * S, block_s), warps)


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout that results for ``x`` [B, C, H, W] have, and operands are brought to."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _flat(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=layout).flatten(2)


def _empty(x: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


def statistics(
    x: Tensor,
    shift: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) [C] of ``x`` [B, C, H, W]; moves the running statistics."""
    flat = _flat(x, layout_of(x))
    B, C, S = flat.shape
    config = Config.of_sums(flat)
    mean = torch.empty(C, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    partial = mean.new_empty(2, config.parts, C) if config.parts > 1 else None
    if num_batches_tracked is not None and momentum is None:
        num_batches_tracked.add_(1)
    running = running_mean, running_var
    shift, *moved = (None if z is None else z.contiguous() for z in (shift, *running))
    written = shift, mean, rstd, *moved, num_batches_tracked
    with on_device(x):
        grid = config.parts, triton.cdiv(C, config.block_c)
        _batch_norm_statistics_kernel[grid](
            flat, partial, *written, B * S, S, C, *flat.stride(), config.steps,
            EPS=eps, MOMENTUM=momentum,
            BLOCK_S=config.block_s, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
        if partial is not None:
            # Each program reads all parts of a few channels: 32 numbers a thread at most.
            block_p = power_of_2(config.parts)
            block_c = min(power_of_2(C), max(4096 // block_p, 1), 16)
            _batch_norm_merge_kernel[(triton.cdiv(C, block_c),)](
                partial, *written, B * S, config.steps * config.block_s, config.parts, C,
                EPS=eps, MOMENTUM=momentum, BLOCK_P=block_p, BLOCK_C=block_c,
                num_warps=config.num_warps,
            )  # fmt: skip
    for given, dense in zip(running, moved, strict=True):
        if given is not None and dense is not None and dense is not given:
            given.copy_(dense)
    return mean, rstd


def forward(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    negative_slope: float,
) -> Tensor:
    """Maps [B, C, H, W] normalised by their statistics, in the layout of ``x``."""
    layout = layout_of(x)
    y, flat = _empty(x, layout), _flat(x, layout)
    B, C, S = flat.shape
    config = Config.choose(flat)
    grid = triton.cdiv(B * S, config.block_s), triton.cdiv(C, config.block_c)
    with on_device(x):
        _batch_norm_forward_kernel[grid](
            flat, None if residual is None else _flat(residual, layout), y,
            mean, rstd, weight.contiguous(), bias.contiguous(), B * S, S, C, *flat.stride(),
            SLOPE=negative_slope,
            BLOCK_S=config.block_s, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and, if ``y`` is given, residual; else that one is empty."""
    layout = layout_of(x)
    grad_x = _empty(x, layout)
    grad_residual = grad.new_empty(0) if y is None else _empty(x, layout)
    g, flat = _flat(grad, layout), _flat(x, layout)
    B, C, S = flat.shape
    # Three maps, or two and two sums, share the registers: with 32 elements a thread they spill.
    config = Config.of_sums(flat, per_thread=16)
    grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
    sums = None if config.parts == 1 else mean.new_empty(2, config.parts, C)
    sum_g, sum_g_normed = (grad_bias, grad_weight) if sums is None else sums
    sizes = B * S, S, C, *flat.stride()
    vectors = mean, rstd, weight.contiguous(), bias.contiguous()
    added = (None, None) if y is None else (_flat(y, layout), grad_residual)
    with on_device(x):
        grid = config.parts, triton.cdiv(C, config.block_c)
        _batch_norm_backward_sums_kernel[grid](
            g, flat, *added, grad_x if sums is None else None, sum_g, sum_g_normed,
            *vectors, *sizes, config.steps, SLOPE=negative_slope,
            BLOCK_S=config.block_s, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
        if sums is None:
            return grad_x, grad_weight, grad_bias, grad_residual
        if y is not None:  # the activation is behind us
            g, negative_slope = grad_residual, 1.0
        grid = triton.cdiv(B * S, config.block_s), triton.cdiv(C, config.block_c)
        _batch_norm_backward_kernel[grid](
            g, flat, grad_x, sums.sum(1), grad_weight, grad_bias, *vectors, *sizes,
            SLOPE=negative_slope,
            BLOCK_S=config.block_s, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias, grad_residual
