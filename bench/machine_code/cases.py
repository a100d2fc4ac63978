"""The calls whose kernels the compile report compiles: the shapes that people use.

Calls are made with tensors of the "meta" device, which have a shape and no content.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from squid_fast.ops.convolution import cell_weights

# N memories of M slots of width C, and the shrinkage that people use there.
MEMORIES = {
    (4, 200, 2048): ("gumbel", "hard", "raw"),  # zhanglab, chexpert: the queue
    (4, 200, 4096): ("gumbel",),  # and the decoder's two matrices
    (4, 200, 8192): ("gumbel",),
    (9, 200, 1024): ("gumbel",),  # digit_anatomy: the queue
    (9, 200, 8192): ("gumbel",),  # and the decoder's two matrices
    (9, 200, 16384): ("gumbel",),
    (9, 200, 128): ("gumbel",),  # small: the queue
    (4, 500, 2048): ("gumbel", "hard"),  # more slots than published
    (4, 1_000, 2048): ("gumbel",),
    (4, 10_000, 2048): ("gumbel",),
    (4, 100_000, 2048): ("gumbel",),
}
SHRINKAGES = {"gumbel": (5, 0.0), "hard": (0, 0.005), "raw": (0, 0.0)}  # top_k, threshold
BATCHES = (1, 16, 32, 64, 128, 256, 512, 4096)  # B: an image, training, windows, screening
TRAINED = (1, 16, 64, 128, 256)  # B in training, of one place or more
SCORED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # B in scoring: graphs take powers of two
SLOTS = (200, 1_000, 10_000)  # M of logits shrunk by themselves
MAPS = (  # N maps of C channels, H x W places, to an image
    (4, 512, 4, 4),  # zhanglab: behind the in-painting
    (4, 256, 8, 8),  # and behind the decoder's memories
    (4, 128, 16, 16),
    (9, 256, 4, 4),  # digit_anatomy
    (9, 128, 8, 8),
    (9, 64, 16, 16),
    (9, 128, 2, 2),  # small
)
# What batch norm is given: maps of N patches, or of whole images, of C channels.
NORMED = (
    (4, 32, 64, 64),  # zhanglab, chexpert: the first stage
    (1, 32, 128, 128),  # and the decoder's last
    (4, 64, 32, 32),
    (4, 512, 4, 4),
    (4, 128, 4, 4),  # the bottleneck
    (1, 32, 32, 32),  # the discriminator
    (1, 64, 16, 16),
    (1, 128, 8, 8),
    (1, 128, 4, 4),
    (9, 32, 32, 32),  # digit_anatomy
    (9, 16, 16, 16),  # small
    (9, 32, 2, 2),
    (1, 128, 2, 2),
)
RESIZES = (  # P, channels, rows and columns of a patch before the resize, channels of the skip
    (1, 512, 4, 4, 256),  # zhanglab: the decoder's steps, patch by patch
    (1, 256, 8, 8, 128),
    (2, 128, 16, 16, 0),  # the step that puts patches together
    (1, 64, 64, 64, 0),  # and whole images
    (1, 256, 4, 4, 128),  # digit_anatomy
    (1, 128, 8, 8, 64),
    (3, 64, 16, 16, 0),
    (1, 128, 2, 2, 0),  # small
    (1, 64, 4, 4, 0),
    (3, 32, 8, 8, 0),
    (1, 32, 64, 64, 16),  # a decoder with skips everywhere
)
IMAGES = (  # P, side, F; of grey images
    (2, 128, 32),  # zhanglab, chexpert
    (3, 96, 32),  # digit_anatomy
    (3, 48, 16),  # small
)
WINDOWS = (  # a map's channels and side, its grid of windows, M, maps to an image
    (256, 8, (2, 2), 200, 4),  # zhanglab
    (128, 16, (2, 2), 200, 4),
    (256, 8, (1, 1), 200, 1),  # digit_anatomy, of which a map is a window
    (64, 16, (1, 1), 500, 9),  # more slots, and all of one memory
)
QUEUES = (  # N, M, C
    (4, 200, 2048),  # zhanglab, chexpert
    (9, 200, 1024),  # digit_anatomy
    (9, 200, 128),  # small
    (4, 500, 2048),  # more slots than published
)
ATTENTIONS = ((4, 2048), (9, 1024), (9, 128))  # N, C; of 8 heads
DISCRIMINATORS = (128, 96, 48, 256)  # image sides: chest radiographs, digit_anatomy, small; large
WIDTHS = (16, 32, 64, 128, 128)  # and channels
CONVOLUTIONS = (  # N maps of C channels, S x S, to D; behind a resize; residual and head behind it
    (4, 32, 32, 64, "plain", ()),  # zhanglab, chexpert: the first stage's second and third
    (4, 32, 32, 64, "plain", ("residual",)),
    (1, 128, 64, 32, "resized", ()),  # and the last two of the decoder
    (1, 64, 32, 64, "resized", ()),
    (1, 32, 32, 128, "plain", ()),
    (1, 32, 32, 128, "plain", ("residual",)),
    (1, 32, 32, 128, "plain", ("residual", "head")),
    (9, 32, 32, 32, "plain", ()),  # digit_anatomy
    (1, 64, 32, 48, "resized", ()),
    (1, 32, 32, 96, "plain", ("residual", "head")),
    (9, 16, 16, 16, "plain", ()),  # small
    (9, 16, 16, 16, "plain", ("residual",)),
    (1, 32, 16, 24, "resized", ()),
    (1, 16, 16, 48, "plain", ("residual", "head")),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A call of a launcher, and what it is called in the report."""

    label: str
    call: Callable[[], Any]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sizes(
    sizes: Iterable[Any], batches: Iterable[int], dtypes: Iterable[torch.dtype] = DTYPES
) -> Iterator[tuple[Any, int, torch.dtype]]:
    """Sizes, batches and dtypes in all combinations, but for float16, in which nothing is computed.

    Kernels take it, laid out as bfloat16 is: it stands at the first size and batch.
    """
    first = True
    for size, B, dtype in itertools.product(sizes, batches, dtypes):
        if dtype != torch.float16 or first:
            yield size, B, dtype
        first = first and dtype != torch.float16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory_lookup(kernels: Any) -> Iterator[Case]:
    named = [(sizes, mode) for sizes, modes in MEMORIES.items() for mode in modes]
    for ((N, M, C), mode), B, dtype in _sizes(named, BATCHES):
        query, memory = _meta(B, N, C, dtype=dtype), _meta(N, M, C, dtype=dtype)
        how = (mode, *SHRINKAGES[mode])
        label = f"B={B} N={N} M={M} C={C} {mode} {_name(dtype)}"
        for keep in (False, True):
            kept = " scores kept" * keep
            scores = _meta(N, B, M) if keep else _meta(0)
            forward = partial(kernels.forward, query, memory, None, *how, keep)
            yield Case(f"memory_lookup.forward {label}{kept}", forward)
            for learn in (False, True):
                backward = partial(kernels.backward, query, query, memory, scores, *how, learn)
                learned = " slots learned" * learn
                yield Case(f"memory_lookup.backward {label}{kept}{learned}", backward)
    # In scoring the queue's answers come with their keys and values.
    for (N, C), B in itertools.product(ATTENTIONS, SCORED):
        query, memory, values = _meta(B, N, C), _meta(N, 200, C), _meta(N, 200, 3 * C)
        how = ("gumbel", *SHRINKAGES["gumbel"], False)
        label = f"B={B} N={N} M=200 C={C} values of {3 * C}"
        call = partial(kernels.forward, query, memory, values, *how)
        yield Case(f"memory_lookup.forward {label}", call)


def _gumbel_shrinkage(kernels: Any) -> Iterator[Case]:
    for M, B, dtype in _sizes(SLOTS, BATCHES):
        logits = _meta(B, M, dtype=dtype)
        label = f"[{B}, {M}] {_name(dtype)}"
        yield Case(f"gumbel_shrinkage.forward {label}", partial(kernels.forward, logits, 5))
        yield Case(f"gumbel_shrinkage.backward {label}", partial(kernels.backward, logits, logits))
        hard = (logits, SHRINKAGES["hard"][1])
        yield Case(f"hard_shrinkage.forward {label}", partial(kernels.hard_forward, *hard))
        backward = partial(kernels.hard_backward, logits, *hard)
        yield Case(f"hard_shrinkage.backward {label}", backward)


def _masked_shortcut(kernels: Any) -> Iterator[Case]:
    layouts = (torch.contiguous_format, torch.channels_last)
    sizes = itertools.product(_sizes(MAPS, TRAINED), layouts, (False, True))
    for ((N, C, H, W), B, dtype), layout, affine in sizes:
        x = _meta(B * N, C, H, W, dtype=dtype).to(memory_format=layout)
        scale = _meta(C) if affine else None
        how = (0.95, _meta(dtype=torch.int64), scale, scale)
        label = f"[{B * N}, {C}, {H}, {W}] {_name(dtype)} {_name(layout)}{' affine' * affine}"
        yield Case(f"masked_shortcut.forward {label}", partial(kernels.forward, x, x, *how))
        inpainted = x if affine else None
        backward = partial(kernels.backward, x, inpainted, *how)
        yield Case(f"masked_shortcut.backward {label}", backward)


def _window_lookup(kernels: Any) -> Iterator[Case]:
    batches = sorted({*BATCHES, *SCORED})
    for (c, side, grid, M, per_image), B, dtype in _sizes(WINDOWS, batches, DTYPES[1:]):
        maps = _meta(B * per_image, c, side, side, dtype=dtype)
        maps = maps.to(memory_format=torch.channels_last)
        windows = grid[0] * grid[1]
        slots = _meta(3, windows, M, maps[0].numel() // windows, dtype=dtype)
        label = f"[{len(maps)}, {c}, {side}, {side}] {windows} windows M={M} {_name(dtype)}"
        call = partial(kernels.forward, maps, slots, None, 5, *grid)
        yield Case(f"window_lookup.forward {label}", call)
    # The queue, asked about features in float32, of which slots and their projections are summed.
    for (N, M, C), B in itertools.product(QUEUES, SCORED):
        maps = _meta(B, N, C)[:, None].permute(0, 3, 1, 2)
        slots = _meta(3, N, M, C, dtype=torch.bfloat16)
        for values in (_meta(N, M, 3 * C), None):
            label = f"[{B}, {N}, {C}] M={M} float32{' values' * (values is not None)}"
            call = partial(kernels.forward, maps, slots, values, 5, 1, N)
            yield Case(f"window_lookup.forward {label}", call)


def _neighbourhood_attention(kernels: Any) -> Iterator[Case]:
    for (N, C), B, dtype in _sizes(ATTENTIONS, BATCHES):
        query, pad = _meta(B, N, C, dtype=dtype), _meta(C, dtype=dtype)
        # As in the model, where one projection makes both.
        key, value = _meta(B, N, 2 * C, dtype=dtype).chunk(2, dim=-1)
        inputs = (query, key, value, pad, pad, 8)
        label = f"[{B}, {N}, {C}] {_name(dtype)}"
        yield Case(f"neighbourhood_attention.forward {label}", partial(kernels.forward, *inputs))
        backward = partial(kernels.backward, query, *inputs)
        yield Case(f"neighbourhood_attention.backward {label}", backward)


def _batch_norm(kernels: Any) -> Iterator[Case]:
    layouts = (torch.channels_last, torch.contiguous_format)
    for ((N, C, H, W), B, dtype), layout in itertools.product(_sizes(NORMED, TRAINED), layouts):
        if layout != layouts[0] and C != 64:
            continue  # only narrow networks train in contiguous layout
        x = _meta(B * N, C, H, W, dtype=dtype).to(memory_format=layout)
        c, tracked = _meta(C), _meta(dtype=torch.int64)
        label = f"[{B * N}, {C}, {H}, {W}] {_name(dtype)} {_name(layout)}"
        moved = partial(kernels.statistics, x, c, c, c, tracked)
        yield Case(f"batch_norm.statistics {label}", partial(moved, 0.1, 1e-5))
        if C == 64:
            yield Case(f"batch_norm.statistics {label} plain mean", partial(moved, None, 1e-5))
        if H <= 4:  # the bottleneck's first convolution has no bias
            alone = partial(kernels.statistics, x, None, c, c, tracked, 0.1, 1e-5)
            yield Case(f"batch_norm.statistics {label} without a shift", alone)
        # As in the model: ReLU everywhere, the residual too; LeakyReLU in the discriminator.
        for residual, slope in ((None, 0.0), (x, 0.0), (None, 0.2)):
            what = f"{label}{' residual' * (residual is not None)} slope {slope}"
            forward = partial(kernels.forward, x, c, c, c, c, residual, slope)
            yield Case(f"batch_norm.forward {what}", forward)
            backward = partial(kernels.backward, x, x, residual, c, c, c, c, slope)
            yield Case(f"batch_norm.backward {what}", backward)


def _upsample_concat(kernels: Any) -> Iterator[Case]:
    layouts = (torch.contiguous_format, torch.channels_last)
    sizes = itertools.product(_sizes(RESIZES, BATCHES), layouts)
    for ((P, C, h, w, S), B, dtype), layout in sizes:
        made = partial(_meta, dtype=dtype)
        x = made(B * P * P, C, h, w).to(memory_format=layout)
        skip = made(B, S, 2 * P * h, 2 * P * w).to(memory_format=layout) if S else None
        out = made(B, S + C, 2 * P * h, 2 * P * w).to(memory_format=layout)
        label = f"{B} images, {P} patches a side, [{C}, {h}, {w}] + {S} {_name(dtype)} "
        label += _name(layout)
        forward = partial(kernels.forward, x, skip, P, out)
        yield Case(f"upsample_concat.forward {label}", forward)
        yield Case(f"upsample_concat.backward {label}", partial(kernels.backward, out, P, x))


def _discriminator(kernels: Any) -> Iterator[Case]:
    batches = sorted({*BATCHES, *SCORED})
    for side, B, norm in itertools.product(DISCRIMINATORS, batches, (True, False)):
        packed = [_meta(25, WIDTHS[0])]
        for C, N in itertools.pairwise(WIDTHS):
            packed += [_meta(2, 25 * C, N, dtype=torch.float16), _meta(N)]
        biases = [_meta(N) for N in WIDTHS]
        places = (-(-side // 32)) ** 2
        packed.append(_meta(places, WIDTHS[-1]))
        parameters = (biases, biases[1:] if norm else [], _meta(1), packed, 1e-5 if norm else 0.0)
        label = f"[{B}, 1, {side}, {side}] {'instance' if norm else 'running'}"
        call = partial(kernels.forward, _meta(B, 1, side, side), *parameters)
        yield Case(f"discriminator.forward {label}", call)


def _stem(kernels: Any) -> Iterator[Case]:
    pixels = (torch.uint8, torch.float32)
    for ((P, side, F), B, dtype), given in itertools.product(_sizes(IMAGES, SCORED), pixels):
        images = _meta(B, 1, side, side, dtype=given)
        weight = _meta(3, 3, 1, F).permute(3, 2, 0, 1)
        label = f"[{B}, 1, {side}, {side}] {_name(given)} P={P} F={F} {_name(dtype)}"
        call = partial(kernels.forward, images, weight, _meta(F), P, dtype)
        yield Case(f"stem.forward {label}", call)


def _reconstruct(kernels: Any) -> Iterator[Case]:
    layouts = (torch.contiguous_format, torch.channels_last)
    sizes = itertools.product(_sizes(IMAGES, SCORED), layouts, (False, True))
    for ((P, side, F), B, dtype), layout, whole in sizes:
        n, s = (B, side) if whole else (B * P * P, side // P)
        x = _meta(n, F, s, s, dtype=dtype).to(memory_format=layout)
        for given in (torch.uint8, torch.float32):
            images = _meta(B, 1, side, side, dtype=given)
            label = f"[{n}, {F}, {s}, {s}] {_name(dtype)} {_name(layout)} P={P} {_name(given)}"
            call = partial(kernels.forward, x, _meta(1, F, 1, 1), _meta(1), images, P)
            yield Case(f"reconstruct.forward {label}", call)


def _split_linear(kernels: Any) -> Iterator[Case]:
    """The queries, the output and the two layers behind them of the in-painting's attention."""
    for (N, C), B in itertools.product(ATTENTIONS, SCORED):
        for S, T in ((C, C), (C // 4, C), (C, C // 4)):
            weight = _meta(2, S, T, dtype=torch.bfloat16)
            call = partial(kernels.forward, _meta(B * N, T), weight, _meta(S))
            yield Case(f"split_linear.forward [{B * N}, {T}] to {S}", call)


def _convolution(kernels: Any) -> Iterator[Case]:
    for (N, C, D, side, of, rest), B, dtype in _sizes(CONVOLUTIONS, BATCHES, DTYPES[1:]):
        resized = of == "resized"
        weight = _meta(D, C, 3, 3, dtype=dtype)
        weights = _meta(3, 3, 3, 3, C, 2, 2, D, dtype=dtype)
        step = [1, 1]
        if not resized:
            weights, step = cell_weights(weight), [1, 2]
        x = _meta(B * N, C, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        residual = x if "residual" in rest else None
        head = (_meta(D), _meta(1)) if "head" in rest else (None, None)
        label = f"[{B * N}, {C}, {side}, {side}] {' '.join((of, *rest))} {_name(dtype)}"
        call = partial(kernels.forward, x, weights, _meta(D), step, residual, *head)
        yield Case(f"cell_convolution.forward {label}", call)


OPERATIONS = {
    "batch_norm": _batch_norm,
    "convolution": _convolution,
    "discriminator": _discriminator,
    "gumbel_shrinkage": _gumbel_shrinkage,
    "masked_shortcut": _masked_shortcut,
    "memory_lookup": _memory_lookup,
    "neighbourhood_attention": _neighbourhood_attention,
    "reconstruct": _reconstruct,
    "split_linear": _split_linear,
    "stem": _stem,
    "upsample_concat": _upsample_concat,
    "window_lookup": _window_lookup,
}


def cases() -> Iterator[Case]:
    """Every call."""
    for operation, of in OPERATIONS.items():
        yield from of(importlib.import_module(f"squid_fast.kernels.{operation}"))
