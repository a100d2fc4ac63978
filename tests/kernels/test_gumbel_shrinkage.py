"""The kernels of Gumbel and hard shrinkage against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops, reference
from tests.kernels.devices import DTYPES, drawn
from tests.ops.samples import normal, separated, with_gradients
from tests.tolerances import assert_close


def assert_right(logits: Tensor, k: int) -> Tensor:
    """Value and gradient are the reference's; returns the weights."""
    grad = normal(*logits.shape, seed=99).to(logits)
    weights, got = with_gradients(lambda x: ops.gumbel_shrinkage(x, k), [logits], grad)
    wide = logits.detach().double().cpu()
    expected, value = with_gradients(
        lambda x: reference.gumbel_shrinkage(x, k), [wide], grad.cpu().double()
    )
    assert weights.dtype == got.dtype == logits.dtype
    assert_close(weights.cpu(), expected)
    assert_close(got.cpu(), value)
    assert torch.equal(weights.cpu() > 0, expected > 0)
    return weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 3, 7), (5, 33), (1, 200), (17, 64)], ids=str)
def test_equals_reference(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    M = shape[-1]
    for k in sorted({1, 2, 5, M - 1, M} & set(range(1, min(M, 64) + 1))):
        assert_right(separated(*shape).to(device, dtype), k)


@pytest.mark.parametrize("k", [5, 64])
def test_rows_longer_than_a_tile(k: int, device: torch.device) -> None:
    # Three tiles, the largest entries in the last and the first.
    logits = separated(2, 4999, seed=3).to(device, torch.float32)
    logits[:, 4990:4993] += 1
    logits[:, :2] += 2
    assert_right(logits, k)


@drawn
@given(
    rows=st.integers(1, 12),
    M=st.integers(1, 70),
    k=st.integers(1, 64),
    levels=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_ties(rows: int, M: int, k: int, levels: int, seed: int, device: torch.device) -> None:
    logits = torch.randint(levels, (rows, M), generator=torch.Generator().manual_seed(seed))
    k = min(k, M)
    weights = assert_right(logits.to(device, torch.float32), k).cpu()
    # Said without a search: kept is what fewer than k entries equal or exceed.
    kept = (logits[:, None, :] >= logits[:, :, None]).sum(dim=-1) < k
    assert torch.equal(weights > 0, kept)


def test_neighbouring_floats_are_told_apart(device: torch.device) -> None:
    # A step of e^-0.5 is 3e-8, and of the probability after it 1e-8: more than rounding hides.
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.5]])
    logits[0, 2] = logits[0, 2] + 3e-7
    weights = ops.gumbel_shrinkage(logits.to(device), 2).cpu()
    assert weights[0].tolist() == [0, 0, pytest.approx(1, abs=1e-6), 0]


@pytest.mark.parametrize("kind", ["transposed", "strided", "expanded", "vector"])
def test_any_layout(kind: str, device: torch.device) -> None:
    base = separated(6, 10).to(device, torch.float32)
    logits = {
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": base[:1].expand(4, 10),
        "vector": base[0],
    }[kind]
    assert_right(logits, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_and_absent_logits(dtype: torch.dtype, device: torch.device) -> None:
    inf = torch.inf
    logits = torch.tensor([[3e4, 3e4, -3e4, 0.0], [-inf, 1.0, -inf, 1.0], [-inf, -inf, 0.0, 1.0]])
    weights = ops.gumbel_shrinkage(logits.to(device, dtype), 3)
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, torch.e]])
    assert_close(weights.cpu(), expected / expected.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("M", [8, 3000])
def test_nan_spoils_its_row_only(M: int, bad: float, device: torch.device) -> None:
    logits = separated(3, M).to(device, torch.float32)
    clean = ops.gumbel_shrinkage(logits, 3)
    logits[1, M // 2] = bad
    weights = ops.gumbel_shrinkage(logits, 3)
    assert weights[1].isnan().all()
    assert torch.equal(weights[[0, 2]], clean[[0, 2]])


def test_many_rows(device: torch.device) -> None:
    # Rows that do not fill the last program.
    assert_right(separated(203, 9).to(device, torch.float32), 4)


# --- hard shrinkage -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 3, 7), (17, 64), (2, 2500)], ids=str)
@pytest.mark.parametrize("threshold", [0.03, 1.1])
def test_hard_equals_reference(
    threshold: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    logits = separated(*shape).to(device, dtype)
    grad = normal(*shape, seed=99).to(logits)
    actual = with_gradients(lambda x: ops.hard_shrinkage(x, threshold), [logits], grad)
    expected = with_gradients(
        lambda x: reference.hard_shrinkage(x, threshold),
        [logits.cpu().double()],
        grad.cpu().double(),
    )
    for got, value in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        # Where one logit survives, its weight is 1 and its gradient cancels.
        assert_close(got.cpu(), value, floor=1.0)


def test_hard_by_hand(device: torch.device) -> None:
    logits = torch.tensor([[0.5, 1.0, 1.5, 2.5], [0.0, -3.0, 1.0, 0.9]], device=device)
    weights = ops.hard_shrinkage(logits, 1.0).cpu()
    assert_close(weights, torch.tensor([[0, 0, 0.375, 0.625], [0, 0, 0, 0]]))


def test_hard_nan_spoils_its_row_only(device: torch.device) -> None:
    logits = separated(3, 8).to(device, torch.float32)
    clean = ops.hard_shrinkage(logits, 0.2)
    logits[1, 4] = torch.nan
    weights = ops.hard_shrinkage(logits, 0.2)
    assert weights[1].isnan().all()
    assert torch.equal(weights[[0, 2]], clean[[0, 2]])
