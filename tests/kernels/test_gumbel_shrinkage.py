"""The kernels of Gumbel and hard shrinkage against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from squid_fast import ops, reference
from tests.kernels.devices import DEVICE, DTYPES, drawn
from tests.ops.samples import (
    LAYOUTS,
    SEEDS,
    assert_nan_stays_in_its_row,
    compare,
    separated,
    some_k,
    survivors,
    tied,
    up_to,
)
from tests.tolerances import assert_close


def assert_right(logits: Tensor, k: int) -> Tensor:
    """Value, its zeros and the gradient are the reference's; returns the weights."""
    weights = compare(ops.gumbel_shrinkage, reference.gumbel_shrinkage, [logits], k)[0].cpu()
    expected = reference.gumbel_shrinkage(logits.cpu().double(), k)
    assert torch.equal(weights > 0, expected > 0)
    return weights


def logits_on_device(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return separated(*shape, seed=seed).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 3, 7), (5, 33), (1, 200), (17, 64)], ids=str)
def test_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for k in some_k(shape[-1]):
        assert_right(logits_on_device(*shape, dtype=dtype), k)


@pytest.mark.parametrize("k", [5, 64])
def test_rows_longer_than_a_tile(k: int) -> None:
    # Three tiles, the largest entries in the last and the first.
    logits = logits_on_device(2, 4999, seed=3)
    logits[:, 4990:4993] += 1
    logits[:, :2] += 2
    assert_right(logits, k)


@drawn
@given(rows=up_to(12), M=up_to(70), k=up_to(64), levels=up_to(6), seed=SEEDS)
def test_ties(rows: int, M: int, k: int, levels: int, seed: int) -> None:
    logits, k = tied(rows, M, levels, seed), min(k, M)
    weights = assert_right(logits.to(DEVICE, torch.float32), k)
    assert torch.equal(weights > 0, survivors(logits, k))


def test_neighbouring_floats_are_told_apart() -> None:
    # A step of e^-0.5 is 3e-8, and of the probability after it 1e-8: more than rounding hides.
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.5]])
    logits[0, 2] = logits[0, 2] + 3e-7
    weights = ops.gumbel_shrinkage(logits.to(DEVICE), 2)
    assert weights[0].tolist() == [0, 0, pytest.approx(1, abs=1e-6), 0]


@pytest.mark.usefixtures("inexact_exponentials")
@pytest.mark.parametrize(("M", "k"), [(33, 5), (200, 5), (200, 64), (3000, 5)])
def test_the_kth_is_never_kept(M: int, k: int) -> None:
    logits = logits_on_device(40 if M < 3000 else 8, M)
    weights = ops.gumbel_shrinkage(logits, k)
    assert torch.equal(weights > 0, survivors(logits, k))


def test_logits_of_one_probability_have_no_weight() -> None:
    # In float32 all of them have the probability 1/8, and so no distance from the k-th.
    logits = 1e-9 * torch.arange(8.0, device=DEVICE)[None]
    assert (ops.gumbel_shrinkage(logits, 3) == 0).all()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_any_layout(kind: str) -> None:
    assert_right(LAYOUTS[kind](logits_on_device(6, 10)), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_and_absent_logits(dtype: torch.dtype) -> None:
    inf = torch.inf
    logits = torch.tensor([[3e4, 3e4, -3e4, 0.0], [-inf, 1.0, -inf, 1.0], [-inf, -inf, 0.0, 1.0]])
    weights = ops.gumbel_shrinkage(logits.to(DEVICE, dtype), 3)
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, torch.e]])
    assert_close(weights.cpu(), expected / expected.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("M", [8, 3000])
def test_nan_spoils_its_row_only(M: int, bad: float) -> None:
    assert_nan_stays_in_its_row(lambda x: ops.gumbel_shrinkage(x, 3), logits_on_device(3, M), bad)


@pytest.mark.parametrize("rest", [torch.nan, -torch.inf])
def test_nan_is_not_forgotten_before_the_first_finite_logit(rest: float) -> None:
    # Of the tile that the NaN lies in no maximum is known: on a GPU maxima pass over NaN.
    logits = logits_on_device(3, 3000)
    logits[1, :2000] = rest
    logits[1, 7] = torch.nan
    weights = ops.gumbel_shrinkage(logits, 3)
    grad = torch.ops.squid_fast.gumbel_shrinkage_backward(torch.ones_like(logits), logits)
    for found in (weights, grad):
        assert found.isnan().all(dim=1).tolist() == [False, True, False]


def test_many_rows() -> None:
    # Rows that do not fill the last program.
    assert_right(logits_on_device(203, 9), 4)


# --- hard shrinkage -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 3, 7), (17, 64), (2, 2500)], ids=str)
@pytest.mark.parametrize("threshold", [0.03, 1.1])
def test_hard_equals_reference(
    threshold: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    logits = logits_on_device(*shape, dtype=dtype)
    # The floor: where one logit survives, its weight is 1 and its gradient cancels.
    compare(ops.hard_shrinkage, reference.hard_shrinkage, [logits], threshold, floor=1.0)


def test_hard_by_hand() -> None:
    logits = torch.tensor([[0.5, 1.0, 1.5, 2.5], [0.0, -3.0, 1.0, 0.9]], device=DEVICE)
    weights = ops.hard_shrinkage(logits, 1.0).cpu()
    assert_close(weights, torch.tensor([[0, 0, 0.375, 0.625], [0, 0, 0, 0]]))


def test_hard_nan_spoils_its_row_only() -> None:
    logits = logits_on_device(3, 8)
    assert_nan_stays_in_its_row(lambda x: ops.hard_shrinkage(x, 0.2), logits, torch.nan)
