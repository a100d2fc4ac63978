"""The kernel of linear layers in two parts against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from squid_fast import ops
from squid_fast.kernels import dispatch, split_linear
from squid_fast.kernels.card import A100, H100, MI300X, Card
from tests.kernels.devices import DEVICE, DTYPES, ON_GPU, drawn
from tests.ops.samples import normal, up_to
from tests.tolerances import assert_close

HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]
# Two parts of 8 or 11 bits, and the sums of up to some hundred products.
BOUNDS = {torch.bfloat16: 2**-15, torch.float16: 2**-20}
SIZES = [(1, 1, 1), (3, 5, 7), (16, 32, 64), (130, 33, 100), (9, 200, 257), (3, 40, 1000)]
HALF = torch.bfloat16 if ON_GPU else torch.float16


def product(
    R: int, S: int, T: int, dtype: torch.dtype = HALF, bias: bool = True
) -> tuple[list[Tensor | None], Tensor]:
    """Arguments, and what they should give in float64, of numbers that differ in magnitude."""
    x, weight = normal(R, T).float(), normal(S, T, seed=1).float()
    added = normal(S, seed=2).float() if bias else None
    expected = x.double() @ weight.double().T + (0 if added is None else added)
    parts = ops.split(weight, 2, dtype)
    return [None if z is None else z.to(DEVICE) for z in (x, parts, added)], expected


def assert_right(R: int, S: int, T: int, dtype: torch.dtype = HALF, bias: bool = True) -> None:
    arguments, expected = product(R, S, T, dtype, bias)
    assert_close(ops.split_linear(*arguments).cpu(), expected, BOUNDS[dtype], floor=1.0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1), (3, 5, 7), (16, 32, 64), (130, 33, 100), (9, 200, 257), (3, 40, 1000)],
    ids=str,
)
def test_equals_the_formula(size: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    assert_right(*size, dtype, bias)


@drawn
@given(R=up_to(70), S=up_to(70), T=up_to(70))
def test_drawn_sizes(R: int, S: int, T: int) -> None:
    assert_right(R, S, T)


def test_one_part_would_not_do() -> None:
    (x, parts, _), expected = product(32, 32, 64, bias=False)
    high = torch.stack([parts[0], torch.zeros_like(parts[0])])
    found = ops.split_linear(x, high).cpu()
    assert float((found - expected).abs().max() / expected.abs().max()) > 16 * BOUNDS[HALF]


def test_rows_of_any_strides_and_dimensions() -> None:
    (x, parts, bias), expected = product(24, 5, 8)
    shaped = ops.split_linear(x.view(2, 3, 4, 8), parts, bias)
    assert torch.equal(shaped.view(24, 5), ops.split_linear(x, parts, bias))
    for given_x, rows in (
        (x.T.contiguous().T, expected),
        (x[::3], expected[::3]),
        (x[:1].expand(24, 8), expected[:1].expand(24, 5)),
    ):
        assert_close(ops.split_linear(given_x, parts, bias).cpu(), rows, BOUNDS[HALF])
    turned = parts.mT.contiguous().mT
    assert torch.equal(ops.split_linear(x, turned, bias), shaped.view(24, 5))
    apart = torch.stack([bias, bias + 1], dim=1)[:, 0]
    assert torch.equal(ops.split_linear(x, parts, apart), shaped.view(24, 5))


@pytest.mark.parametrize(
    ("dtype", "served"), [*((half, True) for half in HALVES), (torch.float32, False)]
)
def test_only_parts_of_half_precision_are_served(dtype: torch.dtype, served: bool) -> None:
    # Of float32 a dot makes TF32 on a card, though not in the interpreter.
    (x, parts, _), _ = product(3, 4, 5, dtype)
    assert dispatch.serves_split_linear(x, parts) == served
    assert not dispatch.serves_split_linear(x.to(dtype), parts)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_stays_in_its_row(bad: float) -> None:
    (x, parts, bias), _ = product(40, 40, 40)
    clean = ops.split_linear(x, parts, bias)
    x[20, 20] = bad
    found = ops.split_linear(x, parts, bias)
    assert found[20].isnan().all()
    found[20] = clean[20]
    assert torch.equal(found, clean)


def test_same_bits_every_time() -> None:
    arguments, _ = product(70, 70, 130)
    first, second = (ops.split_linear(*arguments) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("card", [A100, H100, MI300X], ids=lambda card: card.arch)
def test_few_rows_take_small_tiles(card: Card) -> None:
    few, many = (split_linear.Config.choose(R, 2048, 2048, card) for R in (4, 4096))
    assert few.block_r == 16
    assert few.parts > 1
    assert many.block_r * many.block_s >= 8192
    assert many.parts == 1
