"""Convolutions in cells against the resize and the convolution one after the other, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from squid_fast import ops
from squid_fast.ops.convolution import cell_weights, resized_weights
from tests.ops.samples import (
    DTYPES,
    LAST,
    convolution_inputs,
    normal,
    plain_convolution,
    resized_convolution,
)
from tests.tolerances import TOLERANCES, assert_close

SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (1, 7), (4, 3), (5, 2), (7, 5), (8, 13)]
sizes = pytest.mark.parametrize(("height", "width"), SIZES)


@sizes
def test_four_phases_are_the_resize_and_the_convolution(height: int, width: int) -> None:
    x, weight, bias = convolution_inputs(3, 5, 4, height, width)
    found = ops.cell_convolution(x, resized_weights(weight, height, width), bias)
    assert found.is_contiguous(memory_format=LAST)
    expected = resized_convolution(x, weight, bias)
    # Every border and corner is the same to rounding; without its own weights it would not be.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_border_has_weights_of_its_own() -> None:
    x, weight, bias = convolution_inputs(1, 5, 4, 6, 6)
    bias += 9  # so that no ReLU hides a difference
    inner = resized_weights(weight, 6, 6)[1:2, 1:2]
    wrong = ops.cell_convolution(x, inner, bias) - resized_convolution(x, weight, bias)
    off = wrong.abs().amax(dim=(0, 1)) > 1e-12
    assert not off[2:-2, 2:-2].any()
    assert all(edge.all() for edge in (off[0], off[-1], off[:, 0], off[:, -1]))


@sizes
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_cells_are_the_convolution(height: int, width: int, columns: int) -> None:
    x, weight, bias = convolution_inputs(3, 5, 4, height, width)
    found = ops.cell_convolution(x, cell_weights(weight, columns), bias, (1, columns))
    expected = plain_convolution(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@sizes
def test_a_step_of_two_is_a_stride(height: int, width: int) -> None:
    x, weight, bias = convolution_inputs(2, 5, 4, height, width)
    found = ops.cell_convolution(x, cell_weights(weight, 1), bias, (2, 2))
    expected = plain_convolution(x, weight, bias, stride=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("headed", [False, True])
def test_residual_and_head(headed: bool, resized: bool, dtype: torch.dtype) -> None:
    x, weight, bias = convolution_inputs(2, 5, 4, 3, 6)
    x, weight = x.to(dtype), weight.to(dtype)
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    side = (6, 12) if resized else (3, 6)
    residual, head = normal(2, 4, *side, seed=3).to(dtype), (normal(4, seed=4), normal(1, seed=5))
    weights = resized_weights(weight, 3, 6).to(dtype) if resized else cell_weights(weight)
    found = ops.cell_convolution(
        x,
        weights,
        bias.to(accurate),
        (1, 1) if resized else (1, 2),
        residual=residual,
        head=tuple(part.to(accurate) for part in head) if headed else None,
    )
    plain = resized_convolution if resized else plain_convolution
    given = x.double(), weight.double(), bias, residual.double()
    expected = plain(*given, head=head if headed else None)
    assert found.dtype == (accurate if headed else dtype)
    # Half precision rounds the weights of the phases, even where a head's output is in float32.
    assert_close(found, expected, TOLERANCES[dtype])


def test_layouts_and_strides_do_not_matter() -> None:
    x, weight, bias = convolution_inputs(2, 4, 4, 6, 8)
    weights = resized_weights(weight, 3, 4)
    strided, expanded = x[:, :, ::2, ::2], x[:, :1, :1, :1].expand(2, 4, 3, 4)
    for given in (strided, expanded, strided.contiguous()):
        found = ops.cell_convolution(given, weights, bias, residual=normal(2, 4, 6, 8, seed=7))
        again = ops.cell_convolution(
            given.contiguous(memory_format=LAST),
            weights,
            bias,
            residual=normal(2, 4, 6, 8, seed=7).to(memory_format=LAST),
        )
        torch.testing.assert_close(found, again, rtol=0, atol=1e-14)


def test_no_images_are_no_results() -> None:
    x, weight, bias = convolution_inputs(0, 5, 4, 3, 6)
    assert ops.cell_convolution(x, cell_weights(weight), bias, (1, 2)).shape == (0, 4, 3, 6)


def test_compiled_equals_eager() -> None:
    torch.compiler.reset()
    x, weight, bias = convolution_inputs(2, 5, 4, 3, 6)
    weights = resized_weights(weight, 3, 6)

    def call(x: Tensor) -> Tensor:
        return ops.cell_convolution(x, weights, bias).relu() + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x))
