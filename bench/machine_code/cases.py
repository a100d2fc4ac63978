"""The calls whose kernels the compile report compiles: the shapes that people use.

Calls are made with tensors of the "meta" device, which have a shape and no content.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
BATCHES = (1, 16, 64, 512, 4096)  # B: one image, training, the decoder's windows, screening
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
WINDOWS = (  # a map's channels and side, its grid of windows, M, maps to an image
    (256, 8, (2, 2), 200, 4),  # zhanglab
    (128, 16, (2, 2), 200, 4),
    (256, 8, (1, 1), 200, 1),  # digit_anatomy, of which a map is a window
    (64, 16, (1, 1), 500, 9),  # more slots, and all of one memory
)
ATTENTIONS = ((4, 2048), (9, 1024), (9, 128))  # N, C; of 8 heads
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A call of a launcher, and what it is called in the report."""

    label: str
    call: Callable[[], Any]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory_lookup(kernels: Any) -> Iterator[Case]:
    named = [(sizes, mode) for sizes, modes in MEMORIES.items() for mode in modes]
    for ((N, M, C), mode), B, dtype in itertools.product(named, BATCHES, DTYPES):
        if mode != "gumbel" and dtype == torch.float16:
            continue  # laid out as bfloat16 is, which stands for both where nobody is expected
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


def _gumbel_shrinkage(kernels: Any) -> Iterator[Case]:
    for M, B, dtype in itertools.product(SLOTS, BATCHES, DTYPES):
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
    sizes = itertools.product(MAPS, BATCHES, DTYPES, layouts, (False, True))
    for (N, C, H, W), B, dtype, layout, affine in sizes:
        x = _meta(B * N, C, H, W, dtype=dtype).to(memory_format=layout)
        scale = _meta(C) if affine else None
        how = (0.95, _meta(dtype=torch.int64), scale, scale)
        label = f"[{B * N}, {C}, {H}, {W}] {_name(dtype)} {_name(layout)}{' affine' * affine}"
        yield Case(f"masked_shortcut.forward {label}", partial(kernels.forward, x, x, *how))
        inpainted = x if affine else None
        backward = partial(kernels.backward, x, inpainted, *how)
        yield Case(f"masked_shortcut.backward {label}", backward)


def _window_lookup(kernels: Any) -> Iterator[Case]:
    for (c, side, grid, M, per_image), B, dtype in itertools.product(WINDOWS, BATCHES, DTYPES[1:]):
        maps = _meta(B * per_image, c, side, side, dtype=dtype)
        maps = maps.to(memory_format=torch.channels_last)
        windows = grid[0] * grid[1]
        slots = _meta(3, windows, M, maps[0].numel() // windows, dtype=dtype)
        label = f"[{len(maps)}, {c}, {side}, {side}] {windows} windows M={M} {_name(dtype)}"
        call = partial(kernels.forward, maps, slots, 5, *grid)
        yield Case(f"window_lookup.forward {label}", call)


def _neighbourhood_attention(kernels: Any) -> Iterator[Case]:
    for (N, C), B, dtype in itertools.product(ATTENTIONS, BATCHES, DTYPES):
        query, pad = _meta(B, N, C, dtype=dtype), _meta(C, dtype=dtype)
        # As in the model, where one projection makes both.
        key, value = _meta(B, N, 2 * C, dtype=dtype).chunk(2, dim=-1)
        inputs = (query, key, value, pad, pad, 8)
        label = f"[{B}, {N}, {C}] {_name(dtype)}"
        yield Case(f"neighbourhood_attention.forward {label}", partial(kernels.forward, *inputs))
        backward = partial(kernels.backward, query, *inputs)
        yield Case(f"neighbourhood_attention.backward {label}", backward)


OPERATIONS = {
    "gumbel_shrinkage": _gumbel_shrinkage,
    "masked_shortcut": _masked_shortcut,
    "memory_lookup": _memory_lookup,
    "neighbourhood_attention": _neighbourhood_attention,
    "window_lookup": _window_lookup,
}


def cases() -> Iterator[Case]:
    """Every call."""
    for operation, of in OPERATIONS.items():
        yield from of(importlib.import_module(f"squid_fast.kernels.{operation}"))
