"""Batch norm's kernels against float64, and PyTorch's module for the running statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops, reference
from squid_fast.kernels import batch_norm as launchers
from squid_fast.kernels import card
from tests.kernels.devices import DEVICE, DTYPES, drawn, tensors
from tests.kernels.test_masked_shortcut import (
    LAYOUTS,
    Layout,
    channels_last,
    contiguous,
    layouts,
)
from tests.ops.samples import (
    norm_inputs,
    norm_of,
    norm_of_pytorch,
    normal,
    running_statistics,
    up_to,
    with_gradients,
)
from tests.tolerances import TOLERANCES, assert_close

SHAPES = [(1, 1, 1, 2), (2, 1, 17, 13), (64, 3, 1, 1), (2, 37, 17, 13)]
SHAPES += [(2, 70, 4, 4), (5, 3, 61, 29)]  # more channels, and more positions, than a tile
SHAPES += [(3, 9, 29, 31)]  # several tiles that one program goes through
slopes = pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
residuals = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])


def samples(
    shape: tuple[int, ...], residual: bool, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """x, weight, bias and perhaps a residual, and an upstream gradient."""
    x, weight, bias, *rest = norm_inputs(shape, residual)
    maps = tensors([x, *rest, normal(*shape, seed=9)], dtype)
    return [maps[0], *tensors([weight, bias]), *maps[1:-1]], maps[-1]


def assert_right(inputs: list[Tensor], slope: float, grad: Tensor) -> list[Tensor]:
    """Value and gradients are those of the reference in float64."""
    actual = with_gradients(norm_of(ops.batch_norm, slope), inputs, grad)
    wide = [x.double() for x in inputs]
    expected = with_gradients(norm_of(reference.batch_norm, slope), wide, grad.double())
    x, tolerance = inputs[0], TOLERANCES[grad.dtype]
    assert actual[0].dtype == x.dtype
    # The gradients of weight and bias are sums of terms that cancel.
    terms = (x.numel() / x.shape[1]) ** 0.5
    for got, value, floor in zip(actual, expected, (1, 1, terms, terms, 1), strict=False):
        assert_close(got, value, tolerance, floor=floor)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@residuals
@layouts
@pytest.mark.parametrize(
    ("shape", "slope"), [*zip(SHAPES, [0.0, 0.2, 1.0] * 3, strict=False)], ids=str
)
def test_equals_the_reference(
    shape: tuple[int, ...], slope: float, layout: Layout, residual: bool, dtype: torch.dtype
) -> None:
    (x, weight, bias, *rest), grad = samples(shape, residual, dtype)
    if rest:  # the sign is that of the rounded result
        z = reference.batch_norm(*(z.double() for z in (x, weight, bias, rest[0])))
        rest = [torch.where(z.abs() < 1e-3, rest[0] + 1, rest[0])]
    found = assert_right([layout(x), weight, bias, *map(layout, rest)], slope, layout(grad))
    assert significant(found[0]) == significant(layout(x))


def significant(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_any_two_layouts(first: Layout, second: Layout) -> None:
    (x, weight, bias, residual), grad = samples((2, 5, 6, 7), residual=True)
    inputs = [first(x), weight[:1].expand(5), bias, second(residual)]
    assert_right(inputs, 0.0, second(grad))
    assert_right(inputs[:3], 0.2, second(grad))


@drawn
@given(
    shape=st.tuples(up_to(4), up_to(40), up_to(9), st.integers(2, 9)),
    layout=st.sampled_from([contiguous, channels_last]),
    slope=st.sampled_from([0.0, 0.3, 1.0]),
    residual=st.booleans(),
)
def test_drawn_sizes(shape: tuple[int, ...], layout: Layout, slope: float, residual: bool) -> None:
    (x, weight, bias, *rest), grad = samples(shape, residual)
    if shape[0] * shape[2] * shape[3] > 2:  # else rounding decides on which side of zero x lies
        assert_right([layout(x), weight, bias, *map(layout, rest)], slope, grad)


# --- statistics -----------------------------------------------------------------------------------


def moved(
    x: Tensor, momentum: float | None, shift: Tensor | None, gradients: bool = True
) -> dict[str, Tensor]:
    """The running statistics after ``x``."""
    C = x.shape[1]
    running = {name: value.to(DEVICE) for name, value in running_statistics(C).items()}
    ones = torch.ones(C, device=DEVICE)
    with torch.set_grad_enabled(gradients):
        ops.batch_norm(x, ones, ones, **running, momentum=momentum, shift=shift)
    return running


@pytest.mark.parametrize("given_shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (2, 70, 9, 40)], ids=str)
def test_running_statistics_are_those_of_pytorch(
    shape: tuple[int, ...], momentum: float | None, given_shift: bool
) -> None:
    x = norm_inputs(shape)[0].float().to(DEVICE)
    shift = normal(shape[1], seed=9).float().to(DEVICE) if given_shift else None
    expected = norm_of_pytorch(momentum, x.cpu(), None if shift is None else shift.cpu())
    for gradients in (False, True):
        for name, value in moved(x, momentum, shift, gradients).items():
            assert_close(value.double().cpu(), expected[name].double(), 1e-6)


@pytest.mark.parametrize("side", [4, 40])  # with one part, and with many to merge
def test_statistics_of_any_stride_are_moved_where_they_are(side: int) -> None:
    x = norm_inputs((3, 5, side, side))[0].float().to(DEVICE)
    shift, *_ = tensors([normal(5, seed=9)])
    expected = moved(x, 0.1, shift)
    ones = torch.ones(5, device=DEVICE)
    running = {name: value.to(DEVICE) for name, value in running_statistics(5).items()}
    both = [torch.stack([running[name], ones], dim=1) for name in ("running_mean", "running_var")]
    running |= {"running_mean": both[0][:, 0], "running_var": both[1][:, 0]}
    apart = torch.stack([shift, ones], dim=1)[:, 0]
    ops.batch_norm(x, ones, ones, **running, shift=apart)
    for name, value in expected.items():
        assert_close(running[name].double(), value.double(), 1e-6)
    assert all(torch.equal(pair[:, 1], ones) for pair in both)  # what lies between is left alone


@layouts
@pytest.mark.parametrize("parts", [1, 3, 64, 500])
def test_statistics_do_not_cancel(parts: int, layout: Layout) -> None:
    # Their mean is 4,096 deviations from zero: in float32, E[x^2] - E[x]^2 has lost every digit.
    # Of the deviation four are left, since the means of the parts are rounded to 2e-4 of it.
    x = layout((4096 + torch.randn(4, 3, 64, 64)).to(DEVICE))
    with card.assume(card.Card("sm_90", multiprocessors=-(-parts // 4), shared_memory=0)):
        mean, rstd = launchers.statistics(x, None, None, None, None, 0.1, 0.0)
    var, exact = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    assert_close(mean, exact, 1e-6)
    assert_close(rstd, var.rsqrt(), 1e-4)


def test_every_part_is_merged() -> None:
    # The last part is the shortest; parts differ in their means, by which a plain mean would err.
    x = torch.arange(2 * 61 * 67.0, device=DEVICE).view(2, 1, 61, 67)
    for multiprocessors in (1, 2, 7, 132):
        with card.assume(card.Card("sm_90", multiprocessors, shared_memory=0)):
            mean, rstd = launchers.statistics(x, None, None, None, None, 0.1, 0.0)
        assert_close(mean, x.double().mean().view(1), 1e-6)
        assert_close(rstd, x.double().var(correction=0).rsqrt().view(1), 1e-6)


def test_a_constant_channel_is_its_bias() -> None:
    x = torch.full((2, 3, 4, 4), 5.0, device=DEVICE)
    weight, bias = tensors([normal(3), normal(3, seed=1)])
    y = ops.batch_norm(x, weight, bias)
    assert torch.equal(y, bias[:, None, None].expand_as(y))


# --- edges ----------------------------------------------------------------------------------------


@slopes
@residuals
def test_nan_stays_in_its_channel(residual: bool, slope: float) -> None:
    (x, weight, bias, *rest), grad = samples((3, 5, 9, 7), residual)
    x[1, 3, 2, 2] = torch.nan
    found = with_gradients(norm_of(ops.batch_norm, slope), [x, weight, bias, *rest], grad)
    others = [0, 1, 2, 4]
    assert found[0][:, 3].isnan().all()
    for values in found[:2]:
        assert values[:, others].isfinite().all()
    for values in found[2:4]:
        assert values[others].isfinite().all()


@slopes
def test_infinity_and_nan_of_the_residual_stay_in_their_places(slope: float) -> None:
    (x, weight, bias, residual), _ = samples((2, 3, 4, 4), residual=True)
    clean = ops.batch_norm(x, weight, bias, residual=residual, negative_slope=slope)
    bad = torch.tensor([torch.inf, -torch.inf, torch.nan], device=DEVICE)
    residual[0, 1, 2, :3] = bad
    y = ops.batch_norm(x, weight, bias, residual=residual, negative_slope=slope)
    assert y[0, 1, 2, 0] == torch.inf
    assert y[0, 1, 2, 1] == (0 if slope == 0 else -torch.inf)
    assert y[0, 1, 2, 2].isnan()
    y[0, 1, 2, :3] = clean[0, 1, 2, :3]
    assert torch.equal(y, clean)


@layouts
@residuals
def test_same_bits_every_time(residual: bool, layout: Layout) -> None:
    (x, weight, bias, *rest), grad = samples((3, 66, 31, 7), residual, torch.float16)
    inputs = [layout(x), weight, bias, *map(layout, rest)]
    call = norm_of(ops.batch_norm, 0.0)
    assert all(map(torch.equal, *(with_gradients(call, inputs, grad) for _ in range(2))))
    first, second = (moved(inputs[0], 0.1, None) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_equals_eager_and_moves_the_statistics(momentum: float | None) -> None:
    torch.compiler.reset()
    (x, weight, bias, residual), grad = samples((2, 3, 4, 4), residual=True)
    results = []
    for compiled in (False, True):
        running = {name: value.to(DEVICE) for name, value in running_statistics(3).items()}
        how = {"momentum": momentum, "shift": bias} | running
        call = norm_of(ops.batch_norm, 0.0, **how)
        function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
        found = with_gradients(function, [x, weight, bias, residual], grad)
        results.append([*found, *running.values()])
    assert all(map(torch.equal, *results))
    assert int(results[1][-1]) == 5
