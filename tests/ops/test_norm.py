"""Batch norm in training: values, gradients, running statistics; against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from squid_fast import ops, reference
from squid_fast.ops import norm
from tests.ops.samples import (
    DTYPES,
    compare,
    norm_inputs,
    norm_of,
    norm_of_pytorch,
    norm_operators,
    normal,
    running_statistics,
)
from tests.tolerances import TOLERANCES, assert_close

SHAPES = [(1, 1, 1, 2), (3, 5, 7, 2), (2, 17, 3, 33), (64, 3, 1, 1)]
layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
residuals = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
slopes = pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
momenta = pytest.mark.parametrize("momentum", [0.1, 1.0, None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [ops.batch_norm, norm_operators])
@residuals
@slopes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@layouts
def test_norm_equals_reference(
    layout: torch.memory_format, shape: tuple, slope: float, residual: bool, function, dtype
) -> None:
    x, weight, bias, *rest = norm_inputs(shape, residual)
    if residual:  # half precision rounds on both ways to the kink
        z = reference.batch_norm(x, weight, bias, rest[0])
        rest = [rest[0] + z.sign() * (z.abs() < 0.1) / 4]
    maps = [z.to(dtype).to(memory_format=layout) for z in (x, *rest)]
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [maps[0], weight.to(wide), bias.to(wide), *maps[1:]]
    fast, plain = norm_of(function, slope), norm_of(reference.batch_norm, slope)
    # PyTorch's own sums are good to that much; of two values a channel, the gradient of x cancels.
    bound = 5e-5 if (function, dtype) == (ops.batch_norm, torch.float32) else TOLERANCES[dtype]
    found = compare(fast, plain, inputs, tolerance=bound, floor=1.0)
    assert found[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("function", [ops.batch_norm, norm_operators])
@residuals
@slopes
def test_norm_gradcheck(slope: float, residual: bool, function) -> None:
    inputs = [x.requires_grad_() for x in norm_inputs((2, 3, 3, 2), residual)]
    assert torch.autograd.gradcheck(norm_of(function, slope), inputs)


@pytest.mark.parametrize("as_operator", [False, True], ids=["", "operator"])
@pytest.mark.parametrize("given", [False, True], ids=["", "shift"])
@momenta
def test_norm_moves_the_running_statistics_as_pytorch_does(
    momentum: float | None, given: bool, as_operator: bool
) -> None:
    x = norm_inputs((3, 5, 4, 2))[0].float()
    shift = normal(5, seed=9).float() if given else None
    for gradients in (False, True):
        running = running_statistics(5)
        with torch.set_grad_enabled(gradients):
            if as_operator:
                moved = partial(norm._batch_norm_statistics, x.detach(), shift)
                moved(*running.values(), momentum, 1e-5)
            else:
                how = {"momentum": momentum, "shift": shift} | running
                ops.batch_norm(x.requires_grad_(), torch.ones(5), torch.zeros(5), **how)
        for name, value in norm_of_pytorch(momentum, x.detach(), shift).items():
            assert_close(running[name].double(), value.double(), 1e-6)


def test_norm_backward_may_follow_another_forward() -> None:
    # As with PyTorch's, the running statistics are no part of the graph.
    x, weight, bias = (z.float().requires_grad_() for z in norm_inputs((2, 3, 4, 4)))
    running, shift = running_statistics(3), torch.ones(3)
    call = norm_of(ops.batch_norm, 0.0, shift=shift, **running)
    first = call(x, weight, bias)
    call(x, weight, bias)
    (expected,) = torch.autograd.grad(norm_of(ops.batch_norm, 0.0)(x, weight, bias).sum(), x)
    (found,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(found, expected)


def test_norm_has_no_gradient_for_the_shift() -> None:
    shift = torch.ones(3, requires_grad=True)
    x, weight, bias = (z.float().requires_grad_() for z in norm_inputs((2, 3, 4, 4)))
    ops.batch_norm(x, weight, bias, **running_statistics(3), shift=shift).sum().backward()
    assert shift.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norm_with_parameters_of_half_precision(dtype: torch.dtype) -> None:
    inputs = [z.to(dtype) for z in norm_inputs((4, 3, 5, 5), residual=True)]
    for function in (ops.batch_norm, norm_operators):
        fast, plain = norm_of(function, 0.0), norm_of(reference.batch_norm, 0.0)
        compare(fast, plain, inputs, tolerance=TOLERANCES[dtype], floor=4.0)


@layouts
def test_norm_of_strided_maps(layout: torch.memory_format) -> None:
    x, weight, bias, residual = norm_inputs((4, 6, 10, 8), residual=True)
    x = x.to(memory_format=layout)[::2, ::3, 1::2]
    residual = residual[:1, :1, :1].expand(4, 6, 10, 8)[::2, ::3, 1::2]
    inputs = [x, weight[:2], bias[:1].expand(2), residual]
    for function in (ops.batch_norm, norm_operators):
        compare(norm_of(function, 0.0), norm_of(reference.batch_norm, 0.0), inputs)


@slopes
def test_norm_keeps_nan_and_infinity_as_relu_does(slope: float) -> None:
    x, weight, bias, residual = norm_inputs((2, 3, 4, 4), residual=True)
    residual[0, 0, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0])
    x[1, 1, 2, 2] = torch.nan
    for function in (ops.batch_norm, norm_operators):
        y = function(x, weight, bias, residual=residual, negative_slope=slope)
        low = 0.0 if slope == 0 else -torch.inf
        assert y[0, 0, 0, :2].tolist() == [torch.inf, low]
        assert y[0, 0, 0, 2].isnan()
        assert y[:, 1].isnan().all()  # whose statistics are NaN
        assert y[:, 2].isfinite().all()


def test_norm_of_one_value_a_channel_is_refused_as_by_pytorch() -> None:
    x = torch.zeros(1, 3, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        nn.BatchNorm2d(3)(x)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ops.batch_norm(x, torch.ones(3), torch.zeros(3))


def test_compiled_norm_moves_the_running_statistics() -> None:
    torch.compiler.reset()
    x, weight, bias = (z.float() for z in norm_inputs((2, 3, 4, 4)))
    results = []
    for compiled in (False, True):
        running = running_statistics(3)

        def call(x: Tensor, running: dict[str, Tensor] = running) -> Tensor:
            how = {"shift": bias} | running
            return ops.batch_norm(x, weight, bias, **how)

        function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
        with torch.no_grad():
            results.append([function(x), function(2 * x), *running.values()])
    assert all(map(torch.equal, *results))
    assert int(results[1][-1]) == 6
