"""The masked shortcut's kernels against float64, and what the draw promises."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops
from squid_fast.ops.philox import philox_uniform
from squid_fast.ops.shortcut import shortcut_mask
from tests.kernels.devices import DEVICE, DTYPES, drawn, tensors
from tests.kernels.layouts import LAYOUTS, Layout, channels_last, contiguous
from tests.ops.samples import (
    assert_backward_repeats_the_draw,
    blend,
    normal,
    shortcut_of,
    up_to,
    with_gradients,
)
from tests.tolerances import TOLERANCES, assert_close

SHAPES = [(1, 1, 1, 1), (2, 1, 17, 13), (3, 37, 1, 5), (2, 37, 17, 13)]
SHAPES += [(2, 70, 4, 4), (5, 3, 31, 29)]  # more channels, and more positions, than a tile
SEED = 2**61 + 12345  # both of its words count


layouts = pytest.mark.parametrize("layout", [contiguous, channels_last])
affines = pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])


def samples(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inpainted, shortcut, scale, shift and an upstream gradient."""
    C = shape[1]
    x, y, grad = (normal(*shape, seed=seed).to(DEVICE, dtype) for seed in (0, 1, 4))
    return [x, y, *tensors([normal(C, seed=2), normal(C, seed=3)]), grad]


def assert_right(inputs: list[Tensor], keep: float, grad: Tensor) -> None:
    """Value and gradients are those of the formula in float64, exactly so without an affine."""
    seed = torch.tensor(SEED, device=DEVICE)
    mask = shortcut_mask(seed, tuple(grad.shape), keep)
    actual = with_gradients(shortcut_of(keep, seed), inputs, grad)
    wide = [x.double() for x in inputs]
    expected = with_gradients(partial(blend, mask), wide, grad.double())
    if len(inputs) == 2:
        assert all(torch.equal(a, e.to(a.dtype)) for a, e in zip(actual, expected, strict=True))
        return
    for got, value in zip(actual[:3], expected[:3], strict=True):
        assert_close(got, value, TOLERANCES[grad.dtype])
    # What scale and shift get is a float32 sum, of terms that may cancel.
    terms = mask.sum().clamp_min(1).sqrt().item()
    for got, value in zip(actual[3:], expected[3:], strict=True):
        assert got.dtype == torch.float32
        assert_close(got, value, floor=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@affines
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(
    shape: tuple[int, ...], layout: Layout, affine: bool, dtype: torch.dtype
) -> None:
    x, y, scale, shift, grad = samples(shape, dtype)
    inputs = [layout(x), layout(y)] + [scale, shift] * affine
    assert_right(inputs, 0.3 if dtype == torch.float32 else 0.95, layout(grad))


@affines
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(LAYOUTS, 2)))
def test_any_two_layouts(first: Layout, second: Layout, affine: bool) -> None:
    x, y, scale, shift, grad = samples((2, 5, 6, 7))
    inputs = [first(x), second(y)] + [scale, shift[:1].expand(5)] * affine
    assert_right(inputs, 0.6, second(grad))


def significant(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@drawn
@given(
    shape=st.tuples(up_to(4), up_to(40), up_to(9), up_to(9)),
    first=st.sampled_from(LAYOUTS),
    second=st.sampled_from(LAYOUTS),
    keep=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    affine=st.booleans(),
)
def test_drawn_sizes(
    shape: tuple[int, ...], first: Layout, second: Layout, keep: float, affine: bool
) -> None:
    x, y, scale, shift, grad = samples(shape)
    x, y = first(x), second(y)
    assert_right([x, y] + [scale, shift] * affine, keep, first(grad))
    # The fakes promise the strides of torch.where.
    out = shortcut_of(keep, torch.tensor(SEED, device=DEVICE))(x, y)
    assert significant(out) == significant(torch.where(x[:, :1].bool(), x, y))


# --- the draw -------------------------------------------------------------------------------------


def mask_of(
    shape: tuple[int, ...], keep: float, seed: int | None = None, layout: Layout = contiguous
) -> Tensor:
    """What a kernel drew, read off its result: True where it took ``inpainted``."""
    ones, zeros = (layout(f(shape, device=DEVICE)) for f in (torch.ones, torch.zeros))
    given_seed = None if seed is None else torch.tensor(seed, device=DEVICE)
    return ops.masked_shortcut(ones, zeros, keep, given_seed) == 1


# Its rate, its independence and that channels share it: see tests/ops/test_shortcut.py.
@layouts
@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**40 + 2**33 + 77, 2**62 - 1, -1])
def test_mask_is_that_of_pytorch(seed: int, layout: Layout) -> None:
    cases = [((3, 2, 33, 31), keep) for keep in (0.05, 0.3, 0.5, 0.95)]
    cases += [((6, 1, 64, 64), 0.5), ((3, 130, 5, 5), 0.5)]  # many tiles of positions, of channels
    for shape, keep in cases:
        expected = shortcut_mask(torch.tensor(seed, device=DEVICE), shape, keep)
        assert torch.equal(mask_of(shape, keep, seed, layout), expected.expand(shape))


@triton.jit
def _draw_kernel(out_ptr, seed, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out_ptr + place, tl.rand(seed, place))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 + 5, 2**40 + 2**33 + 77, 2**62 - 1])
def test_numbers_are_those_of_triton(seed: int) -> None:
    numbers = torch.empty(1024, device=DEVICE)
    _draw_kernel[(1,)](numbers, seed, 1024)
    assert torch.equal(numbers.cpu(), philox_uniform(torch.tensor(seed), 1024))


def test_draw_at_the_probability_itself_is_not_kept() -> None:
    # Were either compared in another precision, the draw that equals the probability would tell.
    draws = philox_uniform(torch.tensor(SEED), 64)
    for place in range(8):
        expected = (draws < draws[place]).view(1, 1, 8, 8).to(DEVICE)
        assert not expected.view(-1)[place]
        assert torch.equal(mask_of((1, 1, 8, 8), draws[place].item(), SEED), expected)


def test_every_call_draws_anew() -> None:
    first, second = (mask_of((2, 1, 32, 32), 0.5) for _ in range(2))
    # Two fair draws differ in half of the places.
    assert abs((first != second).double().mean().item() - 0.5) < 4.5 * 0.5 / 2048**0.5


@affines
def test_backward_repeats_the_draw(affine: bool) -> None:
    assert_backward_repeats_the_draw(affine, DEVICE)


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 1.0])
@layouts
def test_nothing_or_everything_is_kept(layout: Layout, keep: float) -> None:
    x, y, *_, grad = samples((2, 3, 32, 33))
    call = shortcut_of(keep, torch.tensor(SEED, device=DEVICE))
    out, kept, passed = with_gradients(call, [layout(x), layout(y)], layout(grad))
    assert torch.equal(out, x if keep else y)
    assert torch.equal(kept, grad * keep)
    assert torch.equal(passed, grad * (1 - keep))


@affines
@layouts
def test_nan_that_is_not_chosen_reaches_nothing(layout: Layout, affine: bool) -> None:
    shape, keep, seed = (2, 5, 9, 7), 0.5, torch.tensor(SEED, device=DEVICE)
    mask = shortcut_mask(seed, shape, keep)
    x, y, scale, shift, grad = samples(shape)
    clean, poisoned = (
        with_gradients(
            shortcut_of(keep, seed),
            [layout(x.where(mask, rest)), layout(y.where(~mask, rest))] + [scale, shift] * affine,
            layout(grad),
        )
        for rest in (1.0, torch.nan)
    )
    assert all(map(torch.equal, poisoned, clean))


@affines
def test_nan_that_is_chosen_stays(affine: bool) -> None:
    x, y, scale, shift, _ = samples((1, 2, 3, 3))
    call = shortcut_of(1.0, torch.tensor(SEED, device=DEVICE))
    assert call(x * torch.nan, y, *[scale, shift] * affine).isnan().all()


@layouts
def test_same_bits_every_time(layout: Layout) -> None:
    x, y, scale, shift, grad = samples((1, 66, 31, 7), torch.float16)
    call = shortcut_of(0.95, torch.tensor(SEED, device=DEVICE))
    inputs = [layout(x), layout(y), scale, shift]
    assert all(map(torch.equal, *(with_gradients(call, inputs, grad) for _ in range(2))))
