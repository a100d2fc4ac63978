"""The kernels of the resize with its skip against float64."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops, reference
from squid_fast.kernels import dispatch
from tests.kernels.devices import DEVICE, DTYPES, drawn, tensors
from tests.kernels.layouts import LAYOUTS, Layout, channels_last, contiguous
from tests.ops.samples import Resize, normal, resize_inputs, up_to, with_gradients
from tests.tolerances import TOLERANCES, assert_close

SIZES: list[Resize] = [(1, 1, 1, 1, 1, 0), (1, 2, 3, 1, 7, 1), (1, 1, 70, 5, 3, 66)]
SIZES += [(2, 2, 5, 1, 1, 3), (2, 1, 5, 4, 6, 0), (3, 1, 2, 3, 5, 2), (3, 2, 33, 1, 2, 0)]
SIZES += [(1, 1, 2, 17, 67, 1), (1, 1, 64, 9, 6, 129)]  # more than a tile along every axis

layouts = pytest.mark.parametrize("layout", [contiguous, channels_last])


def maps(sizes: Resize, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return tensors(resize_inputs(sizes), dtype)


def assert_right(num_patch: int, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Value and gradients are those of the formula in float64, and the skip is not touched."""
    call = partial(ops.upsample_concat, num_patch=num_patch)
    actual = with_gradients(call, inputs, grad)
    plain = partial(reference.upsample_concat, num_patch=num_patch)
    # On a CPU, since PyTorch's own backward is not deterministic on a GPU, and says so.
    wide = [x.cpu().double() for x in (*inputs, grad)]
    expected = with_gradients(plain, wide[:-1], wide[-1])
    for got, value in zip(actual, expected, strict=True):
        assert got.dtype == grad.dtype
        assert_close(got.cpu(), value, TOLERANCES[grad.dtype])
    S = grad.shape[1] - inputs[0].shape[1]
    if S:
        assert torch.equal(actual[0][:, :S], inputs[1])
        assert torch.equal(actual[2], grad[:, :S])
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@layouts
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_formula(sizes: Resize, layout: Layout, dtype: torch.dtype) -> None:
    *inputs, grad = map(layout, maps(sizes, dtype))
    out, grad_x, *_ = assert_right(sizes[0], inputs, grad)
    form = torch.channels_last if layout is channels_last else torch.contiguous_format
    assert grad_x.is_contiguous(memory_format=form)
    if inputs[0].shape[2:].numel() > 1:  # a single pixel lies in memory in one way only
        assert out.is_contiguous(memory_format=form)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(LAYOUTS, 2)))
def test_any_two_layouts(first: Layout, second: Layout) -> None:
    for sizes in ((1, 2, 5, 3, 4, 3), (2, 2, 5, 3, 4, 3)):
        x, skip, grad = maps(sizes)
        assert_right(sizes[0], [first(x), second(skip)], second(grad))


@drawn
@given(
    sizes=st.tuples(up_to(3), up_to(2), up_to(70), up_to(6), up_to(6), st.integers(0, 20)),
    layout=st.sampled_from(LAYOUTS),
    of_skip=st.sampled_from(LAYOUTS),
)
def test_drawn_sizes(sizes: Resize, layout: Layout, of_skip: Layout) -> None:
    x, *skip, grad = maps(sizes)
    assert_right(sizes[0], [layout(x), *map(of_skip, skip)], layout(grad))


@layouts
@pytest.mark.parametrize("num_patch", [1, 2])
def test_same_bits_as_pytorch_where_nothing_is_rounded(num_patch: int, layout: Layout) -> None:
    *inputs, grad = (layout((4 * x).round()) for x in maps((num_patch, 2, 6, 5, 7, 4)))
    call = partial(ops.upsample_concat, num_patch=num_patch)
    ours = with_gradients(call, inputs, grad)
    plain = partial(reference.upsample_concat, num_patch=num_patch)
    expected = with_gradients(plain, [x.cpu() for x in inputs], grad.cpu())
    assert all(torch.equal(a.cpu(), e) for a, e in zip(ours, expected, strict=True))


@layouts
def test_constant_maps_stay_as_they_are(layout: Layout) -> None:
    # The weights of a place add up to 1 without rounding, at the border too.
    values = normal(1, 9, 1, 1).float().expand(2, 9, 5, 3).to(DEVICE)
    out = ops.upsample_concat(layout(values))
    assert torch.equal(out, values[:, :, :1, :1].expand(2, 9, 10, 6))


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@layouts
def test_nan_reaches_the_places_that_it_is_weighted_for(layout: Layout, bad: float) -> None:
    x, skip, _ = (layout(z) for z in maps((1, 2, 3, 5, 6, 2)))
    for y, column in ((2, 3), (0, 0), (4, 5), (0, 3)):
        broken = x.clone()
        broken[1, 1, y, column] = bad
        out = ops.upsample_concat(broken, skip)
        reached = torch.zeros_like(out, dtype=torch.bool)
        rows, columns = (
            slice(max(2 * y - 1, 0), 2 * y + 3),
            slice(max(2 * column - 1, 0), 2 * column + 3),
        )
        reached[1, 2 + 1, rows, columns] = True
        assert torch.equal(~out.isfinite(), reached)
        assert torch.equal(out[~reached], ops.upsample_concat(x, skip)[~reached])


@layouts
def test_nan_of_a_gradient_stays_near(layout: Layout) -> None:
    x, skip, grad = (layout(z) for z in maps((1, 2, 3, 5, 6, 2)))
    clean = with_gradients(ops.upsample_concat, [x, skip], grad)
    grad[0, 4, 6, 0] = torch.nan  # of x: its third channel, rows 2 and 3, column 0
    grad[0, 1] = torch.nan  # of the skip
    _, grad_x, grad_skip = with_gradients(ops.upsample_concat, [x, skip], grad)
    reached = torch.zeros_like(grad_x, dtype=torch.bool)
    reached[0, 2, 2:4, 0] = True
    assert torch.equal(grad_x.isnan(), reached)
    assert torch.equal(grad_x[~reached], clean[1][~reached])
    assert torch.equal(grad_skip.isnan(), grad[:, :2].isnan())


@layouts
def test_same_bits_every_time(layout: Layout) -> None:
    *inputs, grad = map(layout, maps((2, 1, 66, 9, 7, 3), torch.float16))
    call = partial(ops.upsample_concat, num_patch=2)
    assert all(map(torch.equal, *(with_gradients(call, inputs, grad) for _ in range(2))))


def test_what_the_kernels_serve() -> None:
    assert dispatch.serves_upsample_concat(torch.zeros(1, 2, 3, 3, device=DEVICE))
    assert not dispatch.serves_upsample_concat(torch.zeros(0, 2, 3, 3, device=DEVICE))
    assert not dispatch.serves_upsample_concat(torch.zeros(1, 2, 3, 3, device=DEVICE).double())
    huge = torch.zeros(1, 1, 1, 1, device=DEVICE).expand(2**14, 3, 2**9, 2**8)
    assert not dispatch.serves_upsample_concat(huge)
    assert dispatch.serves_upsample_concat(huge[: 2**13])  # 3 * 2**30 elements
