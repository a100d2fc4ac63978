"""Shrinkage and the memory lookup: values, gradients, edges; against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops, reference
from tests.ops.samples import (
    DTYPES,
    LAYOUTS,
    SEEDS,
    assert_nan_stays_in_its_row,
    compare,
    exact_memories,
    looked_up_values,
    normal,
    separated,
    some_k,
    survivors,
    tied,
    up_to,
)
from tests.tolerances import assert_close

SIZES = [1, 2, 3, 5, 7, 17, 33]
GUMBEL = ops.gumbel_shrinkage, reference.gumbel_shrinkage
HARD = ops.hard_shrinkage, reference.hard_shrinkage

# --- gumbel shrinkage -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", SIZES)
def test_gumbel_equals_reference(M: int, dtype: torch.dtype) -> None:
    for k in some_k(M):
        compare(*GUMBEL, [separated(3, 2, M).to(dtype)], k)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 4), M=up_to(40), k=up_to(40), levels=up_to(6), seed=SEEDS)
def test_gumbel_with_ties(rows: int, M: int, k: int, levels: int, seed: int) -> None:
    logits, k = tied(rows, M, levels, seed), min(k, M)
    weights = compare(*GUMBEL, [logits], k)[0]
    kept = survivors(logits, k)
    assert torch.equal(weights > 0, kept)
    assert_close(weights.sum(dim=-1), kept.any(dim=-1).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gumbel_keeps_k_minus_one(dtype: torch.dtype) -> None:
    logits = separated(4, 33).to(dtype)
    for k in range(1, 34):
        weights = ops.gumbel_shrinkage(logits, k)
        assert torch.equal((weights > 0).sum(dim=-1), torch.full((4,), k - 1))
        kept = logits.argsort(dim=-1, descending=True)[:, : k - 1]
        assert (weights.gather(1, kept) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 12])
def test_gumbel_of_equal_logits_is_zero_with_a_gradient(k: int, dtype: torch.dtype) -> None:
    logits = torch.full((2, 12), 3.0, dtype=dtype, requires_grad=True)
    weights = ops.gumbel_shrinkage(logits, k)
    assert torch.equal(weights, torch.zeros_like(weights))
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    row = torch.full((12,), -1 / 144, dtype=torch.float64)
    row[0] += 1 / 12
    assert_close(grad, row.expand(2, 12))


def test_gumbel_separates_near_ties_in_float32() -> None:
    # One float32 step apart at the threshold.
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.5]])
    logits[0, 2] = torch.nextafter(logits[0, 2], torch.tensor(2.0))
    logits = logits.double()
    weights = ops.gumbel_shrinkage(logits, 2)
    assert_close(weights, reference.gumbel_shrinkage(logits, 2))
    assert weights.argmax() == 2


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gumbel_of_huge_logits(dtype: torch.dtype) -> None:
    # exp overflows without the usual subtraction; the runner-up underflows, yet stays above others.
    logits = torch.tensor([[3e4, 3e4, -3e4, 0.0]], dtype=dtype)
    assert_close(ops.gumbel_shrinkage(logits, 3), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))


def test_gumbel_gradient_is_the_softmax_jacobian() -> None:
    logits = separated(7).requires_grad_()
    p = torch.softmax(logits.detach(), dim=0)
    jacobian = torch.autograd.functional.jacobian(lambda x: ops.gumbel_shrinkage(x, 3), logits)
    assert_close(jacobian, p.diag() - p[:, None] * p[None])


# --- hard shrinkage -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", SIZES)
@pytest.mark.parametrize("threshold", [0.03, 1.1])
def test_hard_equals_reference(threshold: float, M: int, dtype: torch.dtype) -> None:
    # The floor: where one logit survives, its weight is 1 and its gradient cancels.
    compare(*HARD, [separated(3, 2, M).to(dtype)], threshold, floor=1.0)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 4), M=up_to(40), threshold=st.floats(1e-3, 2.0), seed=SEEDS)
def test_hard_at_drawn_sizes(rows: int, M: int, threshold: float, seed: int) -> None:
    compare(*HARD, [normal(rows, M, seed=seed)], threshold, floor=1.0)


def test_hard_shrinkage_by_hand() -> None:
    logits = torch.tensor([[0.5, 1.0, 1.5, 2.5], [0.0, -3.0, 1.0, 0.9]], dtype=torch.float64)
    # What lies at the threshold goes; negative logits go, however large.
    expected = torch.tensor([[0, 0, 0.375, 0.625], [0, 0, 0, 0]], dtype=torch.float64)
    assert_close(ops.hard_shrinkage(logits, 1.0), expected)


def test_hard_gradcheck() -> None:
    # Away from the kinks: no logit within 1e-2 of the threshold, one row wholly below it.
    logits = torch.tensor([[-1.0, 0.2, 0.4, 1.7, 0.9], [0.1, 0.2, -0.3, 0.0, 0.1]]).double()
    assert torch.autograd.gradcheck(
        lambda x: ops.hard_shrinkage(x, 0.3), logits.requires_grad_(), atol=1e-7
    )


# --- both shrinkages: layouts and NaN -------------------------------------------------------------

shrinkages = pytest.mark.parametrize(
    ("pair", "setting"), [(GUMBEL, 3), (HARD, 0.2)], ids=["gumbel", "hard"]
)


@shrinkages
@pytest.mark.parametrize("kind", [*LAYOUTS, "zero rows"])
def test_shrinkage_of_any_layout(pair: tuple[Callable, Callable], setting: Any, kind: str) -> None:
    base = separated(6, 10)
    compare(*pair, [LAYOUTS[kind](base) if kind in LAYOUTS else base[:0]], setting)


@shrinkages
def test_shrinkage_passes_nan_on_in_its_row_only(
    pair: tuple[Callable, Callable], setting: Any
) -> None:
    assert_nan_stays_in_its_row(lambda x: pair[0](x, setting), separated(3, 8), torch.nan)


# --- memory lookup --------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {"gumbel": {"top_k": 3}, "hard": {"threshold": 0.05}, "raw": {}}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def compare_lookup(query: Tensor, memory: Tensor, mode: dict[str, Any], **how: Any) -> None:
    inputs = [query, memory]
    compare(ops.memory_lookup, reference.memory_lookup, inputs, floor=1.0, **mode, **how)


@modes
@pytest.mark.parametrize(
    ("B", "N", "M", "C"),
    [(1, 1, 3, 1), (1, 4, 33, 7), (2, 9, 17, 5), (3, 1, 5, 33), (5, 2, 7, 17)]
    + [(7, 3, 3, 2), (17, 5, 33, 3), (33, 7, 17, 1), (0, 4, 5, 3)],
)
def test_lookup_equals_reference(B: int, N: int, M: int, C: int, mode: dict[str, Any]) -> None:
    compare_lookup(normal(B, N, C), normal(N, M, C, seed=1), mode)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 6), up_to(5), up_to(20), up_to(12)),
    k=up_to(20),
    threshold=st.floats(1e-3, 2.0),
    mode=st.sampled_from(["gumbel", "hard", "raw"]),
    seed=SEEDS,
)
def test_lookup_at_drawn_sizes(
    sizes: tuple[int, int, int, int], k: int, threshold: float, mode: str, seed: int
) -> None:
    B, N, M, C = sizes
    shrinkage = {"gumbel": {"top_k": min(k, M)}, "hard": {"threshold": threshold}, "raw": {}}
    compare_lookup(normal(B, N, C, seed=seed), normal(N, M, C, seed=seed + 1), shrinkage[mode])


@modes
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_lookup_in_lower_precision(dtype: torch.dtype, mode: dict[str, Any]) -> None:
    query, memory = exact_memories(3, 8, (torch.arange(16) - 3.25) / 8)
    compare_lookup(query.to(dtype), memory.to(dtype), mode)


@modes
def test_lookup_of_any_layout(mode: dict[str, Any]) -> None:
    query, memory = normal(10, 8, 3), normal(6, 14, 8, seed=1)
    compare_lookup(query.permute(0, 2, 1)[::3], memory[::2, 1::2], mode)
    compare_lookup(query[:1, :, :1].mT.expand(5, 6, 8), memory[:1].expand(6, 14, 8), mode)
    # A gradient that is one number seen through strides of zero.
    one = torch.ones((), dtype=torch.float64)
    compare_lookup(normal(4, 6, 8), memory, mode, grad=one.expand(4, 6, 8))


@modes
def test_lookup_in_one_memory_without_the_place(mode: dict[str, Any]) -> None:
    compare_lookup(normal(5, 7), normal(17, 7, seed=1), mode)


@modes
@pytest.mark.parametrize("V", [1, 4, 9])
def test_lookup_of_values_in_place_of_slots(V: int, mode: dict[str, Any]) -> None:
    query, memory, values = normal(5, 3, 4), normal(3, 11, 4, seed=1), normal(3, 11, V, seed=2)
    answer = ops.memory_lookup(query, memory, **mode, values=values)
    assert_close(answer, looked_up_values(query, memory, values, **mode))
    alone = ops.memory_lookup(query[:, 0], memory[0], **mode, values=values[0])
    assert_close(alone, answer[:, 0])


@modes
def test_lookup_passes_nan_on_in_its_row_only(mode: dict[str, Any]) -> None:
    memory = normal(2, 6, 4, seed=1)
    assert_nan_stays_in_its_row(
        lambda query: ops.memory_lookup(query, memory, **mode), normal(3, 2, 4), torch.nan
    )


@modes
def test_every_place_asks_its_own_memory(mode: dict[str, Any]) -> None:
    query, memory = normal(3, 4, 5), normal(4, 6, 5, seed=1)
    before = ops.memory_lookup(query, memory, **mode)
    memory[2] += 1.0
    after = ops.memory_lookup(query, memory, **mode)
    assert torch.equal(after[:, [0, 1, 3]], before[:, [0, 1, 3]])
    assert (after[:, 2] != before[:, 2]).any(dim=-1).all()


def test_lookup_with_one_kept_slot_answers_with_that_slot() -> None:
    query, memory = normal(6, 3, 5), normal(3, 9, 5, seed=1)
    best = torch.einsum("bnc,nmc->bnm", query, memory).argmax(dim=-1)
    expected = memory[torch.arange(3), best]
    assert_close(ops.memory_lookup(query, memory, 2), expected)
    assert torch.equal(ops.memory_lookup(query, memory, 1), torch.zeros_like(query))


@pytest.mark.parametrize("mode", [MODES["hard"], MODES["raw"]], ids=["hard", "raw"])
def test_lookup_gradcheck(mode: dict[str, Any]) -> None:
    query = normal(3, 2, 4).requires_grad_()
    memory = normal(2, 5, 4, seed=1).requires_grad_()
    scores = torch.einsum("bnc,nmc->bnm", query, memory)
    assert (scores - mode.get("threshold", 100.0)).abs().min() > 1e-3  # no kink near by
    assert torch.autograd.gradcheck(
        lambda q, m: ops.memory_lookup(q, m, **mode), (query, memory), atol=1e-6
    )


def test_lookup_gradient_is_that_of_the_softmax_weights() -> None:
    query, memory = normal(3, 2, 4).requires_grad_(), normal(2, 7, 4, seed=1).requires_grad_()
    grad = normal(3, 2, 4, seed=2)
    actual = torch.autograd.grad(ops.memory_lookup(query, memory, 4), (query, memory), grad)
    p = torch.softmax(torch.einsum("bnc,nmc->bnm", query, memory), dim=-1)
    weights = ops.gumbel_shrinkage(torch.einsum("bnc,nmc->bnm", query, memory), 4).detach()
    through_scores = torch.autograd.grad(
        torch.einsum("bnm,nmc->bnc", p, memory.detach()), (query, memory), grad, retain_graph=True
    )
    assert_close(actual[0], through_scores[0])
    through_output = torch.einsum("bnm,bnc->nmc", weights, grad)
    assert_close(actual[1], through_scores[1] + through_output)


def test_lookup_of_a_buffer_gives_the_same_gradient_to_the_query() -> None:
    query, memory = normal(3, 2, 4).requires_grad_(), normal(2, 7, 4, seed=1)
    (alone,) = torch.autograd.grad(ops.memory_lookup(query, memory, 4).square().sum(), query)
    memory.requires_grad_()
    both, _ = torch.autograd.grad(
        ops.memory_lookup(query, memory, 4).square().sum(), (query, memory)
    )
    assert torch.equal(alone, both)
