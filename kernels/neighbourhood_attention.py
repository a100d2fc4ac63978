"""Attention of every patch to its eight neighbours on the grid, forward and backward.

Little is computed per byte: what counts is to fetch queries, keys and values from memory once. A
program serves BLOCK_T patches in a row and one head; the keys around them are one tile [SLOTS,
BLOCK_T, BLOCK_D], all in flight together. Up to eight patches read the same key, but within one
program and moments apart, from the L1 cache. With one patch per program a missing neighbour could
be skipped by a branch, but keys would be read by other multiprocessors, two to three times as much
from L2, which is the bottleneck then. Matrix units on dense scores need sixteen rows: several small
images in a tile, where a weight of zero times the NaN of another image is NaN.

A place outside the grid is a row of padding in the tile, so the softmax knows no special case, and
NaN goes where attention goes and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import card_of, on_device, power_of_2


@triton.jit
def _tile(num_heads):
    """Which tile of rows and which head this program serves."""
    program = tl.program_id(0).to(tl.int64)
    # Heads run fastest: programs that run side by side read side by side.
    return program // num_heads, program % num_heads


@triton.jit
def _neighbours(row, P: tl.constexpr):
    """Steps [SLOTS, BLOCK_T] from rows [BLOCK_T] to those around, and which stay in the grid."""
    patch = (row[None, :] % (P * P)).to(tl.int32)
    if P <= 2:
        # Every patch neighbours every other. One slot each; its own is for all that is outside.
        slot = tl.arange(0, P * P)[:, None]
        step = slot - patch
        inside = step != 0
    else:
        slot = tl.arange(0, 8)[:, None]
        place = slot + slot // 4  # of 3 x 3 places all but the one in the middle
        r = patch // P + place // 3 - 1
        c = patch % P + place % 3 - 1
        step = r * P + c - patch
        inside = (r >= 0) & (r < P) & (c >= 0) & (c < P)
    return step.to(tl.int64), inside


@triton.jit
def _load(pointer, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [..., BLOCK_D] in float32, from pointers [...] to their first channels; 0 if absent."""
    channel = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(exists, -1) & (channel < D)
    return tl.load(tl.expand_dims(pointer, -1) + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_around(pointer, pad_ptr, inside, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Neighbours' rows [SLOTS, BLOCK_T, BLOCK_D] from pointers [SLOTS, BLOCK_T]; else padding."""
    channel = tl.arange(0, BLOCK_D)
    pad = tl.load(pad_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
    x = _load(pointer, inside & exists[None, :], D, BLOCK_D)
    return tl.where(inside[:, :, None], x, pad[None, None, :])


@triton.jit
def _store(pointer, x, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Narrow and store rows [BLOCK_T, BLOCK_D], to pointers [BLOCK_T] to their first channels."""
    channel = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (channel < D)
    tl.store(pointer[:, None] + channel, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _softmax(q, k, inside, P: tl.constexpr, D: tl.constexpr):
    """Weights [SLOTS, BLOCK_T] of keys [SLOTS, BLOCK_T, BLOCK_D]; log of the sum of e^score."""
    outside: tl.constexpr = 9 - P * P if P <= 2 else 1  # places that a slot outside stands for
    scores = tl.sum(q[None, :, :] * k, axis=2) * D**-0.5
    top = tl.max(scores, axis=0)
    weights = tl.exp(scores - top[None, :]) * tl.where(inside, 1, outside)
    total = tl.sum(weights, axis=0)
    return weights * (1 / total)[None, :], top + tl.log(total)


@triton.jit
def _neighbourhood_attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    pad_key_ptr,
    pad_value_ptr,
    out_ptr,
    stride_query,
    stride_key,
    stride_value,
    num_rows,
    num_heads,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Answers of BLOCK_T patches in one head; everything float32, bfloat16 or float16.

    query, key, value: [num_rows, num_heads * D], rows of any stride; num_rows = B * P * P.
    pad_key, pad_value: [num_heads * D]. out: [num_rows, num_heads * D], contiguous.
    """
    tile, head = _tile(num_heads)
    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = row < num_rows
    step, inside = _neighbours(row, P)
    first = head * D
    q = _load(query_ptr + row * stride_query + first, exists, D, BLOCK_D)  # [BLOCK_T, BLOCK_D]
    # Tiles of keys and values are [SLOTS, BLOCK_T, BLOCK_D].
    key = (key_ptr + row * stride_key + first)[None, :] + step * stride_key
    k = _load_around(key, pad_key_ptr + first, inside, exists, D, BLOCK_D)
    value = (value_ptr + row * stride_value + first)[None, :] + step * stride_value
    v = _load_around(value, pad_value_ptr + first, inside, exists, D, BLOCK_D)
    p, _ = _softmax(q, k, inside, P, D)
    out = tl.sum(p[:, :, None] * v, axis=0)
    _store(out_ptr + (row * num_heads + head) * D, out, exists, D, BLOCK_D)


@triton.jit
def _neighbourhood_attention_backward_query_kernel(
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    pad_key_ptr,
    pad_value_ptr,
    grad_query_ptr,
    grad_pad_key_ptr,
    grad_pad_value_ptr,
    lse_ptr,
    delta_ptr,
    stride_grad,
    stride_query,
    stride_key,
    stride_value,
    num_rows,
    num_heads,
    num_tiles,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of num_tiles * BLOCK_T queries in one head, and their part in those of the padding.

    grad, query, key, value, pad_key, pad_value, grad_query: as in the forward.
    grad_pad_key, grad_pad_value: [parts, num_heads * D], float32, to be summed over the parts.
    lse, delta: [num_rows, num_heads], float32, for the next kernel: the log of the sum of e^score,
        and the mean of the weights' gradients.
    """
    part, head = _tile(num_heads)
    first = head * D
    pad_key_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    pad_value_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for tile in range(num_tiles):
        row = (part * num_tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        exists = row < num_rows
        step, inside = _neighbours(row, P)
        q = _load(query_ptr + row * stride_query + first, exists, D, BLOCK_D)  # [BLOCK_T, BLOCK_D]
        g = _load(grad_ptr + row * stride_grad + first, exists, D, BLOCK_D)
        key = (key_ptr + row * stride_key + first)[None, :] + step * stride_key
        k = _load_around(key, pad_key_ptr + first, inside, exists, D, BLOCK_D)
        value = (value_ptr + row * stride_value + first)[None, :] + step * stride_value
        v = _load_around(value, pad_value_ptr + first, inside, exists, D, BLOCK_D)
        p, lse = _softmax(q, k, inside, P, D)  # [SLOTS, BLOCK_T]
        dp = tl.sum(g[None, :, :] * v, axis=2)
        delta = tl.sum(p * dp, axis=0)
        ds = p * (dp - delta[None, :]) * D**-0.5
        dq = tl.sum(ds[:, :, None] * k, axis=0)
        place = row * num_heads + head
        _store(grad_query_ptr + place * D, dq, exists, D, BLOCK_D)
        tl.store(lse_ptr + place, lse, mask=exists)
        tl.store(delta_ptr + place, delta, mask=exists)
        pad_key_sum += tl.sum(tl.where(inside, 0.0, ds), axis=0)[:, None] * q
        pad_value_sum += tl.sum(tl.where(inside, 0.0, p), axis=0)[:, None] * g
    channel = tl.arange(0, BLOCK_D)
    place = (part * num_heads + head) * D + channel
    tl.store(grad_pad_key_ptr + place, tl.sum(pad_key_sum, axis=0), mask=channel < D)
    tl.store(grad_pad_value_ptr + place, tl.sum(pad_value_sum, axis=0), mask=channel < D)


@triton.jit
def _neighbourhood_attention_backward_key_kernel(
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    stride_grad,
    stride_query,
    stride_key,
    stride_value,
    num_rows,
    num_heads,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of BLOCK_T keys and values in one head, from the queries around them.

    grad, query, key, value, lse, delta: as in the kernel above.
    grad_key, grad_value: [num_rows, num_heads * D], contiguous, of the dtype of key.
    """
    tile, head = _tile(num_heads)
    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = row < num_rows
    step, inside = _neighbours(row, P)
    asks = inside & exists[None, :]  # neighbours are mutual
    first = head * D
    k = _load(key_ptr + row * stride_key + first, exists, D, BLOCK_D)  # [BLOCK_T, BLOCK_D]
    v = _load(value_ptr + row * stride_value + first, exists, D, BLOCK_D)
    query = (query_ptr + row * stride_query + first)[None, :] + step * stride_query
    q = _load(query, asks, D, BLOCK_D)  # [SLOTS, BLOCK_T, BLOCK_D]
    grad = (grad_ptr + row * stride_grad + first)[None, :] + step * stride_grad
    g = _load(grad, asks, D, BLOCK_D)
    place = (row[None, :] + step) * num_heads + head
    lse = tl.load(lse_ptr + place, mask=asks, other=0.0)
    delta = tl.load(delta_ptr + place, mask=asks, other=0.0)
    scores = tl.sum(q * k[None, :, :], axis=2) * D**-0.5  # [SLOTS, BLOCK_T]
    p = tl.where(asks, tl.exp(scores - lse), 0.0)
    dp = tl.sum(g * v[None, :, :], axis=2)
    ds = tl.where(asks, p * (dp - delta) * D**-0.5, 0.0)
    place = (row * num_heads + head) * D
    _store(grad_key_ptr + place, tl.sum(ds[:, :, None] * q, axis=0), exists, D, BLOCK_D)
    _store(grad_value_ptr + place, tl.sum(p[:, :, None] * g, axis=0), exists, D, BLOCK_D)


@dataclass(frozen=True)
class Config:
    """What the kernels are compiled for: grids of P x P, heads of D channels, and their tiles."""

    P: int
    D: int
    BLOCK_T: int
    BLOCK_D: int
    num_warps: int

    @staticmethod
    def choose(P: int, D: int, itemsize: int) -> Config:
        """The configuration for any number of images."""
        block_d = power_of_2(D)
        # Channels to a warp: what it reads at once, 16 bytes a thread. Eight slots of 256 channels
        # are 64 registers of each thread once they are float32. Fewer where channels are not read
        # several at a time, since each then needs registers for its address.
        width = 512 // itemsize if D % 8 == 0 else 64
        # A whole image of 2 x 2, nearly one of 3 x 3, so that most neighbours lie in the same tile.
        # No more, since a batch of 16 must occupy the GPU; of narrow heads enough for a warp, of
        # wide ones what eight warps hold.
        block_t = max(4 if P <= 2 else 8, width // block_d)
        block_t = min(block_t, max(8 * width // block_d, 1))
        return Config(P, D, block_t, block_d, min(max(block_t * block_d // width, 1), 8))


def _rows(x: Tensor) -> Tensor:
    """[B, N, C] as [B * N, C] with adjacent channels: a view, unless the strides forbid it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def forward(
    query: Tensor, key: Tensor, value: Tensor, pad_key: Tensor, pad_value: Tensor, num_heads: int
) -> Tensor:
    """Attend; arguments and result as of ``ops.neighbourhood_attention``."""
    B, N, C = query.shape
    config = Config.choose(math.isqrt(N), C // num_heads, query.element_size())
    tiles = triton.cdiv(B * N, config.BLOCK_T)
    out = query.new_empty(B, N, C)
    sources = [_rows(x) for x in (query, key, value)]
    pads = pad_key.contiguous(), pad_value.contiguous()
    sizes = (*(x.stride(0) for x in sources), B * N, num_heads)
    with on_device(query):
        _neighbourhood_attention_forward_kernel[(tiles * num_heads,)](
            *sources, *pads, out, *sizes, **asdict(config)
        )
    return out


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_key: Tensor,
    pad_value: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five tensors, contiguous, from the gradient [B, N, C] of the answers."""
    B, N, C = query.shape
    config = Config.choose(math.isqrt(N), C // num_heads, query.element_size())
    tiles = triton.cdiv(B * N, config.BLOCK_T)
    # Programs that serve several tiles write less of the padding's gradients, whose float32 parts
    # are else as much traffic as a tensor of patches. Sixteen keep a multiprocessor busy.
    num_tiles = max(tiles * num_heads // (16 * card_of(query).multiprocessors), 1)
    parts = triton.cdiv(tiles, num_tiles)
    dq, dk, dv = (query.new_empty(B, N, C) for _ in range(3))
    pad_parts = query.new_empty(2, parts, C, dtype=torch.float32)
    statistics = query.new_empty(2, B * N, num_heads, dtype=torch.float32)
    sources = [_rows(x) for x in (grad, query, key, value)]
    pads = pad_key.contiguous(), pad_value.contiguous()
    sizes = (*(x.stride(0) for x in sources), B * N, num_heads)
    with on_device(query):
        _neighbourhood_attention_backward_query_kernel[(parts * num_heads,)](
            *sources, *pads, dq, *pad_parts, *statistics, *sizes, num_tiles, **asdict(config)
        )
        _neighbourhood_attention_backward_key_kernel[(tiles * num_heads,)](
            *sources, *statistics, dk, dv, *sizes, **asdict(config)
        )
    dpad_key, dpad_value = (x.sum(dim=0).to(query.dtype) for x in pad_parts)
    return dq, dk, dv, dpad_key, dpad_value
