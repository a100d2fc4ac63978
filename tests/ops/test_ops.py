"""The five operations: values, gradients, edges, errors; against the reference in float64."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from shutil import which

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops, reference, vectorised
from squid_fast.vectorised import philox_uniform, shortcut_mask
from tests.tolerances import TOLERANCES, assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 3, 5, 7, 17, 33]

pytestmark = pytest.mark.usefixtures("seeded")


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor
) -> list[Tensor]:
    """The result and the gradients of all inputs for the upstream gradient ``grad``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    gradients = torch.autograd.grad(result, leaves, grad.to(result.dtype), allow_unused=True)
    zero = [torch.zeros_like(x) for x in leaves]
    return [result.detach(), *(z if g is None else g for g, z in zip(gradients, zero, strict=True))]


def compare(
    function: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    floor: float = 0.0,
) -> None:
    """Value and gradients of ``function`` in ``dtype`` against ``expected`` in float64.

    ``floor``: least magnitude that errors are held against, where terms of that size cancel.
    """
    rounded = [x.to(dtype) for x in inputs]
    wide = [x.double() for x in rounded]
    grad = normal(*expected(*wide).shape, seed=99).to(dtype)
    results = with_gradients(function, rounded, grad)
    for actual, value in zip(results, with_gradients(expected, wide, grad.double()), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, value, tolerance, floor)


def separated(*shape: int, seed: int = 0) -> Tensor:
    """Logits whose order survives rounding to half precision, in an order of their own per row."""
    *rows, M = shape
    steps = torch.linspace(-2, 2, M, dtype=torch.float64)
    order = normal(*rows, M, seed=seed).argsort(dim=-1)
    return steps[order]


# --- gumbel shrinkage -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", SIZES)
def test_gumbel_equals_reference(M: int, dtype: torch.dtype) -> None:
    logits = separated(3, 2, M)
    for k in sorted({1, 2, 5, M - 1, M} & set(range(1, M + 1))):
        compare(
            lambda x, k=k: ops.gumbel_shrinkage(x, k),
            lambda x, k=k: reference.gumbel_shrinkage(x, k),
            [logits],
            dtype,
        )


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 4),
    M=st.integers(1, 40),
    k=st.integers(1, 40),
    levels=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_gumbel_with_ties(rows: int, M: int, k: int, levels: int, seed: int) -> None:
    # Few distinct values, so that the threshold is nearly always tied.
    logits = torch.randint(
        levels, (rows, M), generator=torch.Generator().manual_seed(seed)
    ).double()
    k = min(k, M)
    compare(
        lambda x: ops.gumbel_shrinkage(x, k), lambda x: reference.gumbel_shrinkage(x, k), [logits]
    )
    weights = ops.gumbel_shrinkage(logits, k)
    # Said without topk: kept is what fewer than k entries equal or exceed.
    kept = (logits[:, None, :] >= logits[:, :, None]).sum(dim=-1) < k
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


@pytest.mark.parametrize("dtype", LOW, ids=str)
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
    compare(
        lambda x: ops.hard_shrinkage(x, threshold),
        lambda x: reference.hard_shrinkage(x, threshold),
        [separated(3, 2, M)],
        dtype,
        floor=1.0,  # where one logit survives, its weight is 1 and its gradient cancels
    )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 4),
    M=st.integers(1, 40),
    threshold=st.floats(1e-3, 2.0),
    seed=st.integers(0, 2**16),
)
def test_hard_at_drawn_sizes(rows: int, M: int, threshold: float, seed: int) -> None:
    compare(
        lambda x: ops.hard_shrinkage(x, threshold),
        lambda x: reference.hard_shrinkage(x, threshold),
        [normal(rows, M, seed=seed)],
        floor=1.0,
    )


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

SHRINKAGES = {
    "gumbel": (lambda x: ops.gumbel_shrinkage(x, 3), lambda x: reference.gumbel_shrinkage(x, 3)),
    "hard": (lambda x: ops.hard_shrinkage(x, 0.2), lambda x: reference.hard_shrinkage(x, 0.2)),
}
shrinkages = pytest.mark.parametrize(("fast", "plain"), SHRINKAGES.values(), ids=SHRINKAGES.keys())


@shrinkages
@pytest.mark.parametrize("kind", ["transposed", "strided", "expanded", "vector", "zero rows"])
def test_shrinkage_of_any_layout(fast: Callable, plain: Callable, kind: str) -> None:
    base = separated(6, 10)
    logits = {
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": base[:1].expand(4, 10),
        "vector": base[0],
        "zero rows": base[:0],
    }[kind]
    compare(fast, plain, [logits])


@shrinkages
def test_shrinkage_passes_nan_on_in_its_row_only(fast: Callable, plain: Callable) -> None:
    logits = separated(3, 8)
    clean = fast(logits)
    logits[1, 4] = torch.nan
    weights = fast(logits)
    assert weights[1].isnan().all()
    assert torch.equal(weights[[0, 2]], clean[[0, 2]])


# --- memory lookup --------------------------------------------------------------------------------

MODES: dict[str, dict[str, float]] = {
    "gumbel": {"top_k": 3},
    "hard": {"threshold": 0.05},
    "raw": {},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def compare_lookup(
    query: Tensor,
    memory: Tensor,
    mode: dict[str, float],
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
) -> None:
    compare(
        lambda q, m: ops.memory_lookup(q, m, **mode),
        lambda q, m: reference.memory_lookup(q, m, **mode),
        [query, memory],
        dtype,
        tolerance,
        floor=1.0,
    )


@modes
@pytest.mark.parametrize(
    ("B", "N", "M", "C"),
    [
        (1, 1, 3, 1),
        (1, 4, 33, 7),
        (2, 9, 17, 5),
        (3, 1, 5, 33),
        (5, 2, 7, 17),
        (7, 3, 3, 2),
        (17, 5, 33, 3),
        (33, 7, 17, 1),
        (0, 4, 5, 3),
    ],
)
def test_lookup_equals_reference(B: int, N: int, M: int, C: int, mode: dict[str, float]) -> None:
    compare_lookup(normal(B, N, C), normal(N, M, C, seed=1), mode)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 20), st.integers(1, 12)),
    k=st.integers(1, 20),
    threshold=st.floats(1e-3, 2.0),
    mode=st.sampled_from(["gumbel", "hard", "raw"]),
    seed=st.integers(0, 2**16),
)
def test_lookup_at_drawn_sizes(
    sizes: tuple[int, int, int, int], k: int, threshold: float, mode: str, seed: int
) -> None:
    B, N, M, C = sizes
    shrinkage = {"gumbel": {"top_k": min(k, M)}, "hard": {"threshold": threshold}, "raw": {}}
    compare_lookup(normal(B, N, C, seed=seed), normal(N, M, C, seed=seed + 1), shrinkage[mode])


@modes
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_lookup_in_lower_precision(dtype: torch.dtype, mode: dict[str, float]) -> None:
    # The first coordinate alone makes the scores: exact in every dtype, without ties.
    N, M, C = 3, 16, 8
    query, memory = torch.zeros(2, N, C).double(), (4 * normal(N, M, C)).round() / 8
    query[..., 0] = torch.tensor([0.5, 1.0]).view(2, 1)
    memory[..., 0] = (torch.arange(M) - 3.25) / 8
    compare_lookup(query, memory, mode, dtype)


@modes
def test_lookup_of_any_layout(mode: dict[str, float]) -> None:
    query, memory = normal(10, 8, 3), normal(6, 14, 8, seed=1)
    compare_lookup(query.permute(0, 2, 1)[::3], memory[::2, 1::2], mode)
    compare_lookup(query[:1, :, :1].mT.expand(5, 6, 8), memory[:1].expand(6, 14, 8), mode)
    # A gradient that is one number seen through strides of zero.
    q, m = normal(4, 6, 8).requires_grad_(), memory.clone().requires_grad_()
    actual = torch.autograd.grad(ops.memory_lookup(q, m, **mode).sum(), (q, m))
    expected = torch.autograd.grad(reference.memory_lookup(q, m, **mode).sum(), (q, m))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)


@modes
def test_lookup_in_one_memory_without_the_place(mode: dict[str, float]) -> None:
    compare_lookup(normal(5, 7), normal(17, 7, seed=1), mode)


@modes
@pytest.mark.parametrize("V", [1, 4, 9])
def test_lookup_of_values_in_place_of_slots(V: int, mode: dict[str, float]) -> None:
    query, memory, values = normal(5, 3, 4), normal(3, 11, 4, seed=1), normal(3, 11, V, seed=2)
    # The reference sums slots: the weights are those of slots that are the rows of a unit matrix.
    scores = torch.einsum("bnc,nmc->bnm", query, memory)
    shrink = {
        "top_k": lambda s: reference.gumbel_shrinkage(s, 3),
        "threshold": lambda s: reference.hard_shrinkage(s, 0.05),
    }
    weights = shrink[next(iter(mode))](scores) if mode else scores
    answer = ops.memory_lookup(query, memory, **mode, values=values)
    assert_close(answer, torch.einsum("bnm,nmv->bnv", weights, values))
    alone = ops.memory_lookup(query[:, 0], memory[0], **mode, values=values[0])
    assert_close(alone, answer[:, 0])


@modes
def test_lookup_passes_nan_on_in_its_row_only(mode: dict[str, float]) -> None:
    query, memory = normal(3, 2, 4), normal(2, 6, 4, seed=1)
    clean = ops.memory_lookup(query, memory, **mode)
    query[1, 0, 2] = torch.nan
    answer = ops.memory_lookup(query, memory, **mode)
    assert answer[1, 0].isnan().all()
    answer[1, 0] = clean[1, 0]
    assert torch.equal(answer, clean)


@modes
def test_every_place_asks_its_own_memory(mode: dict[str, float]) -> None:
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
def test_lookup_gradcheck(mode: dict[str, float]) -> None:
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


# --- masked shortcut ------------------------------------------------------------------------------


def mask_of(shape: tuple[int, ...], keep: float, seed: Tensor | None = None) -> Tensor:
    """What ``masked_shortcut`` drew, read off its result: True where it took ``inpainted``."""
    return ops.masked_shortcut(torch.ones(shape), torch.zeros(shape), keep, seed) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 2), (2, 17, 3, 33), (0, 3, 4, 4)])
def test_shortcut_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    seed = torch.tensor(1234)
    mask = shortcut_mask(seed, shape, 0.6)
    assert mask.shape == (shape[0], 1, *shape[2:])
    compare(
        lambda a, b: ops.masked_shortcut(a, b, 0.6, seed),
        lambda a, b: reference.masked_shortcut(a, b, 0.6, mask),
        [normal(*shape), normal(*shape, seed=1)],
        dtype,
        tolerance=0.0,
    )


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
def test_shortcut_rate(keep: float) -> None:
    mask = mask_of((8, 1, 128, 128), keep)
    deviation = (keep * (1 - keep) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - keep) < 4.5 * deviation


def test_shortcut_draws_positions_independently() -> None:
    mask = mask_of((12, 1, 64, 64), 0.5).double() - 0.5
    for shift in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 2), (0, 0, 32), (6, 0, 0)]:
        product = mask[:, 0] * mask[:, 0].roll(shift, (0, 1, 2))
        assert abs(product.mean().item()) < 4.5 * 0.25 / mask.numel() ** 0.5, shift
    for axis in [(2, 3), (0, 2), (0, 3)]:  # rates of an image, a column, a row
        counts = mask.mean(dim=(1, *axis)).abs()
        assert counts.max() < 4.5 * 0.5 / (mask.numel() / counts.numel()) ** 0.5


def test_shortcut_draws_once_for_all_channels() -> None:
    mask = mask_of((3, 9, 16, 16), 0.5)
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    assert 0 < mask.sum() < mask.numel()


def test_shortcut_draws_anew_at_every_call_and_repeats_under_a_seed() -> None:
    torch.manual_seed(3)
    first, second = mask_of((2, 1, 32, 32), 0.5), mask_of((2, 1, 32, 32), 0.5)
    # Two fair draws differ in half of the places.
    assert abs((first != second).double().mean().item() - 0.5) < 4.5 * 0.5 / 2048**0.5
    torch.manual_seed(3)
    assert torch.equal(mask_of((2, 1, 32, 32), 0.5), first)
    assert torch.equal(mask_of((2, 1, 32, 32), 0.5), second)


def test_shortcut_backward_uses_the_draw_of_the_forward() -> None:
    shape = (2, 3, 16, 16)
    inpainted, shortcut = torch.ones(shape).requires_grad_(), torch.zeros(shape).requires_grad_()
    out = ops.masked_shortcut(inpainted, shortcut, 0.5)
    ops.masked_shortcut(inpainted, shortcut, 0.5)  # another draw in between
    grad = normal(*shape).float()
    grads = torch.autograd.grad(out, (inpainted, shortcut), grad)
    zero = torch.zeros(())
    assert torch.equal(grads[0], torch.where(out == 1, grad, zero))
    assert torch.equal(grads[1], torch.where(out == 1, zero, grad))


@pytest.mark.parametrize("keep", [0, 1, 0.0, 1.0])
def test_shortcut_is_exact_when_open_or_closed(keep: float) -> None:
    inpainted, shortcut = normal(4, 3, 64, 64), normal(4, 3, 64, 64, seed=1)
    out = ops.masked_shortcut(inpainted, shortcut, keep)
    assert torch.equal(out, inpainted if keep else shortcut)


@pytest.mark.parametrize("word", [0, 2**31 - 1])
def test_shortcut_is_exact_for_the_extreme_draws(word: int, monkeypatch) -> None:
    # Both come up once in 2^31 positions.
    draw = torch.tensor(word).float() * 4.6566127342e-10
    monkeypatch.setattr(vectorised, "philox_uniform", lambda seed, count: draw.expand(count))
    assert not mask_of((1, 1, 2, 2), 0.0).any()
    assert mask_of((1, 1, 2, 2), 1.0).all()


def affine_inputs() -> list[Tensor]:
    return [normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1), normal(3, seed=2), normal(3, seed=3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_shortcut_with_the_affine_in_front(layout: torch.memory_format, dtype: torch.dtype) -> None:
    seed, shape = torch.tensor(11), (2, 3, 4, 5)
    mask = shortcut_mask(seed, shape, 0.6)
    x, y, scale, shift = affine_inputs()
    x, y = (z.to(dtype).to(memory_format=layout) for z in (x, y))

    def plain(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        painted = (x * scale[:, None, None] + shift[:, None, None]).relu()
        return torch.where(mask, painted, y)

    def fast(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.masked_shortcut(x, y, 0.6, seed, scale=scale, shift=shift)

    grad = normal(*shape, seed=9).to(dtype)
    actual = with_gradients(fast, [x, y, scale, shift], grad)
    wide = [z.double() for z in (x, y, scale, shift)]
    expected = with_gradients(plain, wide, grad.double())
    for got, value in zip(actual, expected, strict=True):
        assert_close(got, value, TOLERANCES[dtype], floor=1.0)
    assert actual[0].is_contiguous(memory_format=layout)


def test_shortcut_affine_gradcheck() -> None:
    seed = torch.tensor(5)

    def blend(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.masked_shortcut(x, y, 0.6, seed, scale=scale, shift=shift)

    assert torch.autograd.gradcheck(blend, [x.requires_grad_() for x in affine_inputs()])


def test_shortcut_ignores_what_it_does_not_choose() -> None:
    inpainted = torch.full((2, 3, 8, 8), torch.nan)
    assert torch.equal(
        ops.masked_shortcut(inpainted, torch.ones(2, 3, 8, 8), 0.0), torch.ones(2, 3, 8, 8)
    )


@pytest.mark.parametrize("other", [torch.channels_last, torch.contiguous_format], ids=str)
def test_shortcut_in_channels_last(other: torch.memory_format) -> None:
    seed, grad = torch.tensor(7), normal(2, 5, 6, 4, seed=2)
    a, b = normal(2, 5, 6, 4), normal(2, 5, 6, 4, seed=1)
    expected = with_gradients(lambda x, y: ops.masked_shortcut(x, y, 0.5, seed), [a, b], grad)
    last = [a.to(memory_format=torch.channels_last), b.to(memory_format=other)]
    actual = with_gradients(
        lambda x, y: ops.masked_shortcut(x, y, 0.5, seed),
        last,
        grad.to(memory_format=torch.channels_last),
    )
    for got, value in zip(actual, expected, strict=True):
        assert torch.equal(got, value)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


def test_shortcut_of_strided_maps() -> None:
    seed = torch.tensor(11)
    a, b = normal(4, 6, 10, 8)[::2, ::3, 1::2, :], normal(1, 1, 1, 8).expand(2, 2, 5, 8)
    mask = shortcut_mask(seed, (2, 2, 5, 8), 0.5)
    compare(
        lambda x, y: ops.masked_shortcut(x, y, 0.5, seed),
        lambda x, y: reference.masked_shortcut(x, y, 0.5, mask),
        [a, b],
        tolerance=0.0,
    )


def test_shortcut_gradcheck() -> None:
    seed = torch.tensor(5)
    inputs = (normal(2, 2, 3, 3).requires_grad_(), normal(2, 2, 3, 3, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: ops.masked_shortcut(a, b, 0.5, seed), inputs)


TRITON_RAND = """
import sys, torch, triton, triton.language as tl

@triton.jit
def draw(out_ptr, seed, n: tl.constexpr):
    offset = tl.arange(0, n)
    tl.store(out_ptr + offset, tl.rand(seed, offset))

for seed in map(int, sys.argv[1:]):
    out = torch.empty(1024)
    draw[(1,)](out, seed, 1024)
    print(*(x.hex() for x in out.tolist()))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_shortcut_numbers_are_those_of_triton(tmp_path) -> None:
    script = tmp_path / "rand.py"  # Triton reads a kernel's source from its file
    script.write_text(TRITON_RAND)
    seeds = [0, 1, 12345, 2**31 + 5, 2**40 + 2**33 + 77, 2**62 - 1]
    result = subprocess.run(
        [sys.executable, script, *map(str, seeds)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for seed, line in zip(seeds, result.stdout.splitlines(), strict=True):
        expected = torch.tensor([float.fromhex(x) for x in line.split()])
        assert torch.equal(philox_uniform(torch.tensor(seed), 1024), expected)


def test_shortcut_numbers_by_the_published_algorithm() -> None:
    # Philox 4x32-10 of a zero key and a zero counter: Random123's known answer, word 0.
    word = 0x6627E8D5
    expected = torch.tensor(word, dtype=torch.float32) * 4.6566127342e-10
    assert philox_uniform(torch.tensor(0), 1)[0] == expected


# --- neighbourhood attention ----------------------------------------------------------------------


def attention_inputs(B: int, P: int, C: int, scale: float = 1.0) -> list[Tensor]:
    tensors = [normal(B, P * P, C, scale=scale, seed=s) for s in range(3)]
    return tensors + [normal(C, seed=s) for s in (3, 4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "P", "C", "heads"),
    [
        (1, 1, 1, 1),
        (2, 1, 8, 8),
        (3, 2, 6, 3),
        (1, 3, 7, 7),
        (2, 3, 16, 8),
        (5, 4, 5, 1),
        (1, 5, 34, 2),
        (0, 2, 4, 2),
    ],
)
def test_attention_equals_reference(B: int, P: int, C: int, heads: int, dtype: torch.dtype) -> None:
    compare(
        lambda *x: ops.neighbourhood_attention(*x, heads),
        lambda *x: reference.neighbourhood_attention(*x, heads),
        attention_inputs(B, P, C),
        dtype,
        floor=1.0,  # with P = 1 the gradient of the query cancels
    )


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(0, 3),
    P=st.integers(1, 4),
    heads=st.integers(1, 4),
    width=st.integers(1, 5),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_attention_at_drawn_sizes(B: int, P: int, heads: int, width: int, scale: float) -> None:
    compare(
        lambda *x: ops.neighbourhood_attention(*x, heads),
        lambda *x: reference.neighbourhood_attention(*x, heads),
        attention_inputs(B, P, heads * width, scale),
        floor=1.0,
    )


def test_attention_never_sees_the_patch_itself_nor_the_far_ones() -> None:
    query, key, value, pad_key, pad_value = attention_inputs(1, 4, 4)
    before = ops.neighbourhood_attention(query, key, value, pad_key, pad_value, 2)
    for n in range(16):
        key2, value2 = key.clone(), value.clone()
        key2[:, n] += 1.0
        value2[:, n] -= 2.0
        after = ops.neighbourhood_attention(query, key2, value2, pad_key, pad_value, 2)
        changed = (after != before).any(dim=-1)[0]
        near = {
            r * 4 + c
            for r, c in itertools.product(range(4), range(4))
            if max(abs(r - n // 4), abs(c - n % 4)) == 1
        }
        assert set(changed.nonzero().flatten().tolist()) == near


def test_attention_counts_the_places_outside() -> None:
    # Equal scores: the answer is the mean over eight places, so it counts those outside.
    zero, one = torch.zeros(1, 9, 2).double(), torch.ones(2).double()
    out = ops.neighbourhood_attention(zero, zero, zero, 0 * one, one, 1)
    expected = torch.tensor([5, 3, 5, 3, 0, 3, 5, 3, 5]).double() / 8
    assert_close(out, expected[None, :, None].expand(1, 9, 2))


def test_a_lone_patch_attends_to_padding_only() -> None:
    query, key, value, pad_key, pad_value = attention_inputs(2, 1, 6)
    out = ops.neighbourhood_attention(query, key, value, pad_key, pad_value, 3)
    assert_close(out, pad_value.expand(2, 1, 6))


def test_attention_of_any_layout() -> None:
    B, P, C = 2, 3, 8
    query, key, value = (normal(C, P * P, 2 * B, seed=s).permute(2, 1, 0)[::2] for s in range(3))
    pads = normal(2, C, 2)[..., 0]
    compare(
        lambda *x: ops.neighbourhood_attention(*x, 4),
        lambda *x: reference.neighbourhood_attention(*x, 4),
        [query[:1].expand(B, -1, -1), key, value, *pads],
    )


def test_attention_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in attention_inputs(2, 2, 4)]
    assert torch.autograd.gradcheck(lambda *x: ops.neighbourhood_attention(*x, 2), inputs)


# --- all operators: opcheck, compile --------------------------------------------------------------

LAST = torch.channels_last


def operator_samples() -> dict[str, list[tuple]]:
    """Arguments for each of the ten operators, some with gradients, some strided."""
    logits, grad = normal(3, 7).float(), normal(3, 7, seed=1).float()
    query, memory = normal(3, 2, 4).float(), normal(2, 5, 4, seed=1).float()
    a, b = normal(2, 3, 4, 4).float(), normal(2, 3, 4, 4, seed=1).float()
    seed = torch.tensor(3)
    scale, shift = normal(3, seed=2).float(), normal(3, seed=3).float()
    attention = [x.float() for x in attention_inputs(2, 2, 4)]

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    return {
        "gumbel_shrinkage": [
            (leaf(logits), 3),
            (logits[:, ::2], 2),
            (logits[:0], 1),
            (logits.T, 2),
        ],
        "gumbel_shrinkage_backward": [
            (grad, logits),
            (grad[:1].expand(3, 7), logits),
            (grad, logits.view(7, 3).T),
        ],
        "hard_shrinkage": [(leaf(logits), 0.3), (logits.T, 0.3)],
        "hard_shrinkage_backward": [(grad, logits, 0.3), (grad.T, logits.T, 0.3)],
        "memory_lookup": [
            (leaf(query), memory, None, "gumbel", 2, 0.0, True),
            (leaf(query), leaf(memory), None, "gumbel", 2, 0.0, False),
            (query, leaf(memory), None, "hard", 0, 0.1, True),
            (leaf(query), leaf(memory), None, "raw", 0, 0.0, True),
            (query.mT.contiguous().mT, memory, memory[..., :3], "gumbel", 2, 0.0, False),
            (query, memory, torch.cat([memory, memory], dim=2), "hard", 0, 0.1, True),
        ],
        "memory_lookup_backward": [
            (query, query, memory, scores, mode, 2, 0.1, wanted)
            for mode in MODES
            for wanted in (True, False)
            for scores in (query.new_empty(0), normal(2, 3, 5, seed=2).float())
        ],
        "masked_shortcut": [
            (leaf(a), leaf(b), 0.5, seed, None, None),
            (a.to(memory_format=LAST), b, 0.5, seed, None, None),
            (a.to(memory_format=LAST), b.to(memory_format=LAST), 0.5, seed, None, None),
            (leaf(a), leaf(b), 0.5, seed, leaf(scale), leaf(shift)),
            (a.to(memory_format=LAST), leaf(b), 0.5, seed, scale, leaf(shift)),
        ],
        "masked_shortcut_backward": [
            (a, None, 0.5, seed, None, None),
            (a.to(memory_format=LAST), None, 0.5, seed, None, None),
            (a, b, 0.5, seed, scale, shift),
            (a.to(memory_format=LAST), b, 0.5, seed, scale, shift),
        ],
        "neighbourhood_attention": [
            (*map(leaf, attention), 2),
            (attention[0].mT.contiguous().mT, *attention[1:], 2),
            (*attention, 4),  # heads of width 1
        ],
        "neighbourhood_attention_backward": [(attention[0], *attention, heads) for heads in (2, 4)],
    }


@pytest.mark.parametrize("name", operator_samples())
def test_opcheck(name: str) -> None:
    for sample in operator_samples()[name]:
        torch.library.opcheck(getattr(torch.ops.squid_fast, name), sample)


def test_these_are_all_operators() -> None:
    registered = {
        schema.name.removeprefix("squid_fast::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("squid_fast::")
    }
    assert registered == set(operator_samples())


def compile_cases(
    device: str | torch.device = "cpu",
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    seed = torch.tensor(3, device=device)
    cases = {
        "gumbel": (lambda x: ops.gumbel_shrinkage(x, 3), [normal(5, 9)]),
        "hard": (lambda x: ops.hard_shrinkage(x, 0.3), [normal(5, 9)]),
        "lookup": (
            lambda q, m: ops.memory_lookup(q, m, 3),
            [normal(5, 2, 4), normal(2, 6, 4, seed=1)],
        ),
        "shortcut": (
            lambda a, b: ops.masked_shortcut(a, b, 0.5, seed),
            [normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)],
        ),
        "attention": (
            lambda *x: ops.neighbourhood_attention(*x, 2),
            attention_inputs(2, 2, 4),
        ),
    }
    return {name: (call, [x.to(device) for x in inputs]) for name, (call, inputs) in cases.items()}


# Inductor alone asserts the strides that the fakes promise; on a CPU it needs a C++ compiler.
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                not any(map(which, ("g++", "clang++", "c++"))), reason="there is no C++ compiler"
            ),
        ),
    ],
)
@pytest.mark.parametrize("name", compile_cases())
def test_compiled_equals_eager(name: str, backend: str) -> None:
    torch.compiler.reset()
    function, inputs = compile_cases()[name]
    inputs = [x.float() for x in inputs]
    grad = normal(*function(*inputs).shape, seed=9).float()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for got, value in zip(
        with_gradients(compiled, inputs, grad), with_gradients(function, inputs, grad), strict=True
    ):
        assert torch.equal(got, value)


def test_compiled_shortcut_draws_anew_at_every_call() -> None:
    torch.compiler.reset()
    a, b = torch.ones(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    compiled = torch.compile(
        lambda: ops.masked_shortcut(a, b, 0.5), fullgraph=True, backend="aot_eager"
    )
    share = (compiled() != compiled()).double().mean().item()
    assert abs(share - 0.5) < 4.5 * 0.5 / 2048**0.5


# --- errors ---------------------------------------------------------------------------------------

X = torch.zeros(2, 4)
ERRORS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "k of zero": (
        lambda: ops.gumbel_shrinkage(X, 0),
        "top_k is 0, but there are 4 memory slots; it must lie between 1 and 4.",
    ),
    "a scale without a shift": (
        lambda: ops.masked_shortcut(X[None, None], X[None, None], 0.5, scale=torch.ones(1)),
        "scale is given without shift; an affine needs both, [1] each.",
    ),
    "a shift of other channels": (
        lambda: ops.masked_shortcut(
            X[None, None], X[None, None], 0.5, scale=torch.ones(1), shift=torch.ones(2)
        ),
        "scale is [1] and shift [2]; both must be [1].",
    ),
    "values of other slots": (
        lambda: ops.memory_lookup(X[:, None], X[None], 1, values=X[None, :1]),
        "values is [1, 1, 4]; [1, 2, V] would fit this memory.",
    ),
    "gradients of values": (
        lambda: ops.memory_lookup(X[:, None], X[None], 1, values=X[None].clone().requires_grad_()),
        "values are given while query, memory or values require a gradient",
    ),
    "k above M": (lambda: ops.gumbel_shrinkage(X, 5), "top_k is 5, but there are 4 memory slots"),
    "integer logits": (
        lambda: ops.gumbel_shrinkage(X.long(), 2),
        "logits is torch.int64; a floating-point dtype is needed.",
    ),
    "scalar logits": (lambda: ops.gumbel_shrinkage(X.sum(), 1), "logits is a scalar"),
    "integer logits, hard": (lambda: ops.hard_shrinkage(X.int(), 0.5), "logits is torch.int32"),
    "threshold of zero": (
        lambda: ops.hard_shrinkage(X, 0.0),
        "threshold is 0.0; it must be positive and finite.",
    ),
    "infinite threshold": (lambda: ops.hard_shrinkage(X, torch.inf), "threshold is inf"),
    "NaN threshold": (lambda: ops.hard_shrinkage(X, torch.nan), "threshold is nan"),
    "lookup dimensions": (
        lambda: ops.memory_lookup(torch.zeros(2, 3, 4), torch.zeros(5, 4), 2),
        "query is [2, 3, 4] and memory [5, 4]; they must be [B, N, C] and [N, M, C]",
    ),
    "lookup places": (
        lambda: ops.memory_lookup(torch.zeros(2, 3, 4), torch.zeros(5, 6, 4), 2),
        "query is [2, 3, 4] and memory [5, 6, 4]; a query [B, 5, 4] would fit this memory.",
    ),
    "lookup width": (
        lambda: ops.memory_lookup(torch.zeros(2, 4), torch.zeros(6, 7), 2),
        "a query [B, 1, 7] would fit",
    ),
    "lookup integer": (
        lambda: ops.memory_lookup(torch.zeros(2, 4).long(), torch.zeros(6, 4), 2),
        "query is torch.int64",
    ),
    "lookup both shrinkages": (
        lambda: ops.memory_lookup(X, torch.zeros(6, 4), 2, threshold=0.5),
        "top_k=2 and threshold=0.5 are both given; give one.",
    ),
    "lookup k": (
        lambda: ops.memory_lookup(X, torch.zeros(6, 4), 7),
        "top_k is 7, but there are 6 memory slots",
    ),
    "lookup threshold": (
        lambda: ops.memory_lookup(X, torch.zeros(6, 4), threshold=-1.0),
        "threshold is -1.0",
    ),
    "shortcut shapes": (
        lambda: ops.masked_shortcut(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4), 0.5),
        "inpainted is [1, 2, 3, 3] and shortcut [1, 2, 3, 4]",
    ),
    "shortcut dimensions": (lambda: ops.masked_shortcut(X, X, 0.5), "inpainted is [2, 4]"),
    "shortcut dtypes": (
        lambda: ops.masked_shortcut(
            torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16), 0.5
        ),
        "inpainted is torch.float32 and shortcut torch.bfloat16",
    ),
    "shortcut probability": (
        lambda: ops.masked_shortcut(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), 1.5),
        "keep_probability is 1.5; it must lie in [0, 1].",
    ),
    "attention shapes": (
        lambda: ops.neighbourhood_attention(
            torch.zeros(1, 4, 2), torch.zeros(1, 4, 3), torch.zeros(1, 4, 2), X[0], X[0], 1
        ),
        "query is [1, 4, 2], key [1, 4, 3] and value [1, 4, 2]",
    ),
    "attention grid": (
        lambda: ops.neighbourhood_attention(*[torch.zeros(1, 5, 2)] * 3, X[0], X[0], 1),
        "N is 5; a square grid",
    ),
    "attention heads": (
        lambda: ops.neighbourhood_attention(*[torch.zeros(1, 4, 4)] * 3, X[0], X[0], 3),
        "C is 4 and num_heads 3; the heads must divide C.",
    ),
    "attention padding": (
        lambda: ops.neighbourhood_attention(*[torch.zeros(1, 4, 6)] * 3, X[0], X[0], 3),
        "pad_key is [4] and pad_value [4]; both must be [6].",
    ),
}


@pytest.mark.parametrize(("call", "sentence"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_value(call: Callable[[], Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()
