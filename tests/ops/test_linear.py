"""Linear layers in two parts, on the CPU."""

from __future__ import annotations

import pytest
import torch

from squid_fast import ops
from tests.ops.samples import normal
from tests.tolerances import assert_close


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 2**-16), (torch.float16, 2**-21)], ids=str
)
def test_two_parts_are_the_weight_in_twice_the_bits(dtype: torch.dtype, bound: float) -> None:
    weight = normal(50, 70).float()
    parts = ops.split(weight, 2, dtype)
    assert parts.dtype == dtype
    high, low = parts.double()
    assert ((high + low - weight).abs() <= bound * weight.abs() + 2**-25).all()
    assert not torch.equal(high, weight.double())


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7), (0, 7)], ids=str)
def test_equals_a_linear_layer(shape: tuple[int, ...], wide: torch.dtype) -> None:
    x, weight, bias = normal(*shape).to(wide), normal(4, 7, seed=1), normal(4, seed=2).to(wide)
    parts = ops.split(weight, 2)
    for added in (bias, None):
        expected = x.double() @ weight.T + (0 if added is None else added)
        found = ops.split_linear(x, parts, added)
        assert found.dtype == wide
        assert_close(found, expected, 2**-14, floor=1.0)
