"""Device helpers of more than one kernel: products, shrinkage, softmax, the k best, offsets."""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-12)  # floor of the published normalisations
NEVER = tl.constexpr(float("-inf"))  # a logit that no softmax counts and no selection takes
ALWAYS = tl.constexpr(float("inf"))


@triton.jit
def multiply_tile(
    total, a_ptr, a_stride_r, a_stride_t, x_ptr, x_stride_t, x_stride_s,
    r, s, R, S, T, first_step, last_step, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a[r, t] . x[t, s] over the named steps of BLOCK_T to ``total`` [BLOCK_R, BLOCK_S]."""
    a_ptrs = a_ptr + r[:, None] * a_stride_r
    x_ptrs = x_ptr + s[None, :] * x_stride_s
    for step in range(first_step, last_step):
        t = step * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        a_mask, x_mask = (r < R)[:, None] & (t < T)[None, :], (t < T)[:, None] & (s < S)[None, :]
        a = tl.load(a_ptrs + t[None, :] * a_stride_t, mask=a_mask, other=0.0)
        x = tl.load(x_ptrs + t[:, None] * x_stride_t, mask=x_mask, other=0.0)
        total = tl.dot(a, x, total, input_precision=PRECISION)
    return total


@triton.jit
def keep_above(values, threshold):
    """What exceeds the threshold, not yet normalised, in the shape of the values."""
    distance = values - threshold
    # Asked this way round, NaN is kept and reaches the sum.
    return tl.where(distance <= 0, 0.0, distance * values / (distance + EPSILON))


@triton.jit
def softmax_above(logits, kth, maximum, total):
    """Softmax of the logits [R, M] that exceed the k-th largest ``kth``, 0 for the others.

    Selection compares logits, numbers that are the same wherever they are read. An exponential need
    not be: worked out again for another layout it may differ in its last place, which alone would
    keep the k-th slot at almost its full weight. A NaN in ``total`` reaches the whole row.
    """
    return tl.where(logits <= kth, 0.0, tl.exp(logits - maximum)) / total


@triton.jit
def floored(total):
    """max(total, eps) that passes NaN on."""
    return tl.where(total < EPSILON, EPSILON, total)


@triton.jit
def kth_largest(values, K: tl.constexpr):
    """K-th largest of each row [R] of values [R, M] held in registers, equal ones counted singly.

    Goes down from one distinct value to the next; needs no copy of the values, as sorting would.
    """
    threshold = tl.max(values, axis=1)
    count = tl.sum((values == threshold[:, None]).to(tl.int32), axis=1)
    for _ in range(1, K):
        below = tl.max(tl.where(values < threshold[:, None], values, NEVER), axis=1)
        threshold = tl.where(count < K, below, threshold)
        more = tl.sum((values == threshold[:, None]).to(tl.int32), axis=1)
        count += tl.where(count < K, more, 0)
    return threshold


@triton.jit
def no_best(R: tl.constexpr, K: tl.constexpr, K_TILE: tl.constexpr):
    """Empty list of the K best of each row [R, K_TILE], and their places.

    What the tile has beyond K counts as infinitely good, so that nothing ever takes its place.
    """
    spare = tl.arange(0, K_TILE)[None, :] >= K
    best = tl.where(spare, ALWAYS, NEVER) + tl.zeros([R, K_TILE], tl.float32)
    return best, tl.zeros([R, K_TILE], tl.int32)


@triton.jit
def insert_best(best, places, tile, start):
    """Let entries of the tile [R, M], which begins at place ``start``, replace what they beat.

    Takes as many rounds as the unluckiest row has replacements: many at first, soon none.
    """
    list_columns = tl.arange(0, best.shape[1])[None, :]
    tile_columns = tl.arange(0, tile.shape[1])[None, :]
    worst, worst_at = tl.min(best, axis=1, return_indices=True)
    first, first_at = tl.max(tile, axis=1, return_indices=True)
    while tl.max((first > worst).to(tl.int32), axis=0) > 0:
        replaced = (first > worst)[:, None] & (list_columns == worst_at[:, None])
        best = tl.where(replaced, first[:, None], best)
        places = tl.where(replaced, start + first_at[:, None], places)
        tile = tl.where(tile_columns == first_at[:, None], NEVER, tile)
        worst, worst_at = tl.min(best, axis=1, return_indices=True)
        first, first_at = tl.max(tile, axis=1, return_indices=True)
    return best, places


@triton.jit
def add_to_softmax(maximum, total, tile):
    """Maximum, sum of exponentials [R] after one more tile [R, M] (Milakov & Gimelshein 2018)."""
    larger = tl.maximum(maximum, tl.max(tile, axis=1))
    # Until a finite logit is seen there is nothing to rescale, and inf - inf would be NaN. The
    # total is 0 then, or NaN if one was seen: on a GPU, maxima pass over it.
    rescaled = tl.where(maximum == NEVER, total, total * tl.exp(maximum - larger))
    shift = tl.where(larger == NEVER, 0.0, larger)
    return larger, rescaled + tl.sum(tl.exp(tile - shift[:, None]), axis=1)


@triton.jit
def map_at(position, channel, S, stride_b, stride_c, stride_s):
    """Offsets [BLOCK_S, BLOCK_C] in a map [B, C, S], of 64 bits; divided in 32, which is cheap.

    ``position`` [BLOCK_S] counts the B S positions, ``channel`` is [1, BLOCK_C].
    """
    image, place = (position // S).to(tl.int64), (position % S).to(tl.int64)
    return (image * stride_b + place * stride_s)[:, None] + channel.to(tl.int64) * stride_c


@triton.jit
def window(maps_ptr, n, stride_h, height, run, across):
    """Where window n of the first map begins, of ``across`` windows beside each other."""
    return maps_ptr + (n // across) * height * stride_h + (n % across) * run


@triton.jit
def columns_of(step, run, BLOCK_C: tl.constexpr):
    """The row of a window that a step of BLOCK_C numbers lies in, and their places in that row."""
    steps = tl.cdiv(run, BLOCK_C)
    return step // steps, (step % steps) * BLOCK_C + tl.arange(0, BLOCK_C)
