"""The memory lookup's kernels against the reference in float64, on each of their ways."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops, reference
from squid_fast.kernels import card, matrix_product, memory_lookup, memory_search
from squid_fast.kernels.card import card_of
from tests.kernels.devices import DEVICE, DTYPES, ON_GPU, drawn, tensors
from tests.ops.samples import (
    SEEDS,
    assert_nan_stays_in_its_row,
    compare,
    exact_memories,
    looked_up_values,
    normal,
    separated,
    survivors,
    up_to,
    with_gradients,
)
from tests.tolerances import TOLERANCES, assert_close

MODES: dict[str, dict[str, Any]] = {"gumbel": {"top_k": 3}, "hard": {"threshold": 0.3}, "raw": {}}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())

# B, N, M, C: odd, prime, one, and not a power of two anywhere.
SIZES = [(1, 1, 3, 1), (1, 4, 33, 7), (2, 9, 17, 5), (17, 2, 65, 70), (70, 1, 5, 33)]
SIZES += [(3, 2, 200, 130), (2, 1, 300, 20)]


@pytest.fixture(params=[1, 3], ids=["whole", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are split into so many parts, whatever the shape would choose."""
    split_products(monkeypatch, request.param)


def split_products(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    choose = matrix_product.Config.choose

    def split(*sizes: Any) -> matrix_product.Config:
        config = choose(*sizes)
        T, most_parts = sizes[3], sizes[6]
        steps = -(-T // config.block_t)
        return replace(config, parts=min(parts, steps, most_parts))

    monkeypatch.setattr(matrix_product.Config, "choose", split)


@pytest.fixture
def tiny_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor, which the smallest batch fills."""

    def tiny(x: Tensor) -> card.Card:
        return replace(card_of(x), multiprocessors=1)

    for module in (memory_lookup, memory_search):
        monkeypatch.setattr(module, "card_of", tiny)


def memories(
    B: int, N: int, M: int, C: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Queries and slots whose scores are of the order of one."""
    slots = 2 * normal(N, M, C, seed=seed + 1) / C**0.5
    return tensors([normal(B, N, C, seed=seed), slots], dtype)


def coarse(x: Tensor) -> Tensor:
    """To sixteenths: products and their sums are exact in every order, equal slots score alike."""
    return (16 * x).round() / 16


def assert_right(
    query: Tensor, memory: Tensor, mode: dict[str, Any], grad: Tensor | None = None
) -> list[Tensor]:
    """Answer and gradients are the reference's, with the gradient of the slots and without."""
    if grad is None:
        grad = normal(*query.shape, seed=99).to(query)
    # Scores are float32 sums of C terms, and hard shrinkage divides by their distance from the
    # threshold.
    tolerance = max(TOLERANCES[query.dtype], 3e-5 if "threshold" in mode else 0)
    how: dict[str, Any] = mode | {"grad": grad, "tolerance": tolerance, "floor": 1.0}
    actual = compare(ops.memory_lookup, reference.memory_lookup, [query, memory], **how)
    queue = with_gradients(lambda q: ops.memory_lookup(q, memory, **mode), [query], grad)
    assert all(map(torch.equal, queue, actual))
    return actual


def assert_answer(
    query: Tensor, memory: Tensor, mode: dict[str, Any], tolerance: float | None = None
) -> Tensor:
    """The answer is the reference's, where no gradient is asked for."""
    answer = ops.memory_lookup(query, memory, **mode)
    expected = reference.memory_lookup(query.cpu().double(), memory.cpu().double(), **mode)
    assert_close(answer.cpu(), expected, tolerance, floor=1.0)
    return answer


def assert_values(
    V: int, mode: dict[str, Any], dtype: torch.dtype = torch.float32, M: int = 20
) -> None:
    """Values of width ``V`` and of any strides are answered with in place of slots."""
    query, memory = memories(5, 2, M, 8, dtype=dtype)
    (values,) = tensors([normal(2, M, V, seed=7).mT.contiguous().mT], dtype)
    expected = looked_up_values(*(x.cpu().double() for x in (query, memory, values)), **mode)
    answer = ops.memory_lookup(query, memory, **mode, values=values)
    assert_close(answer.cpu(), expected, floor=1.0)


def assert_kth_is_never_kept(M: int, k: int, dtype: torch.dtype = torch.float32) -> None:
    """The answer from values that name their slots is the weights, of k - 1 slots in every row."""
    rows = torch.linspace(0.5, 1.5, 24).double()
    query, memory = rows[:, None, None], separated(1, M)[..., None]
    (values,) = tensors([torch.eye(M)[None]], dtype)
    weights = ops.memory_lookup(*tensors([query, memory], dtype), k, values=values)[:, 0].cpu()
    scores = (query.to(dtype) * memory.to(dtype).mT).double()[:, 0]
    assert torch.equal(weights > 0, survivors(scores, k))
    assert_close(weights.float().sum(dim=1), torch.ones(24), TOLERANCES[dtype])


def assert_nan_stays(mode: dict[str, Any], M: int = 20, dtype: torch.dtype = torch.float32) -> None:
    query, memory = memories(5, 2, M, 8, dtype=dtype)
    lookup = partial(ops.memory_lookup, memory=memory, **mode)
    assert_nan_stays_in_its_row(lookup, query, torch.nan)


@pytest.mark.usefixtures("parts")
@modes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_reference(size: tuple[int, int, int, int], mode: dict[str, Any]) -> None:
    assert_right(*memories(*size), mode)


@pytest.mark.usefixtures("parts")
@modes
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype: torch.dtype, mode: dict[str, Any]) -> None:
    assert_right(*tensors(exact_memories(3, 8, (torch.arange(18) - 3.25) / 8), dtype), mode)


def few_tiles(sizes: tuple[int, int, int, int]) -> bool:
    """Any size may be large, but not all of them at once, which takes the interpreter seconds."""
    B, N, M, C = sizes
    return ON_GPU or -(-B // 16) * N * -(-M // 32) * -(-C // 32) <= 18


@drawn
@given(
    sizes=st.tuples(up_to(70), up_to(4), up_to(90), up_to(80)).filter(few_tiles),
    k=up_to(64),
    threshold=st.floats(0.01, 1.0),
    mode=st.sampled_from(sorted(MODES)),
    parts=up_to(4),
    seed=SEEDS,
)
# All of them large, once: several tiles in each direction, at several places, in several parts.
@example(sizes=(33, 3, 70, 66), k=64, threshold=0.3, mode="gumbel", parts=3, seed=0)
def test_drawn_sizes(
    sizes: tuple[int, int, int, int], k: int, threshold: float, mode: str, parts: int, seed: int
) -> None:
    query, memory = memories(*sizes, seed=seed)
    drawn = {"gumbel": {"top_k": min(k, sizes[2])}, "hard": {"threshold": threshold}, "raw": {}}
    with pytest.MonkeyPatch.context() as patch:
        split_products(patch, parts)
        if mode != "hard":
            assert_right(query, memory, drawn[mode])
        else:  # a gradient near the threshold is as steep as it is near
            assert_answer(query, memory, drawn[mode], tolerance=1e-4)


@pytest.mark.usefixtures("parts")
@modes
def test_any_strides(mode: dict[str, Any]) -> None:
    query, memory = memories(10, 8, 14, 6)
    turned = query.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    slots = memory.mT.contiguous().mT
    assert_right(turned[::3, ::2], slots[::2, 1::2], mode)
    assert_right(query[:1].expand(5, 8, 6), memory[:1].expand(8, 14, 6), mode)
    assert_right(query, memory, mode, grad=torch.ones(1, 1, 1, device=DEVICE).expand(query.shape))


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("k", [1, 2, 63, 64])
def test_the_smallest_and_largest_k(k: int) -> None:
    answer = assert_right(*memories(3, 2, 80, 16), {"top_k": k})[0]
    assert bool((answer == 0).all()) == (k == 1)


@pytest.mark.usefixtures("parts")
def test_equal_slots_are_ties() -> None:
    # Every slot four times: the k-th is tied with others, which all go.
    query, memory = map(coarse, memories(4, 2, 5, 8))
    for k in (1, 3, 4, 5, 9, 20):
        assert_right(query, memory.repeat(1, 4, 1), {"top_k": k})


@pytest.mark.usefixtures("parts")
@modes
def test_nan_stays_within_its_row(mode: dict[str, Any]) -> None:
    assert_nan_stays(mode)


@pytest.mark.usefixtures("parts")
@modes
@pytest.mark.parametrize("V", [1, 40])
def test_values_in_place_of_slots(V: int, mode: dict[str, Any]) -> None:
    assert_values(V, mode)


@pytest.mark.usefixtures("parts", "inexact_exponentials")
@pytest.mark.parametrize("k", [2, 5, 64])
def test_the_kth_is_never_kept(k: int) -> None:
    assert_kth_is_never_kept(200, k)


# --- one pass -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny_card")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("B", "M", "C"), [(1, 3, 1), (70, 33, 50), (2, 200, 130), (65, 256, 7)])
def test_one_pass(B: int, M: int, C: int, dtype: torch.dtype) -> None:
    query, memory = memories(B, 2, M, C, dtype=dtype)
    assert memory_lookup.Config.choose(B, 2, M, C, 2, memory_lookup.card_of(query))
    for k in sorted({1, 2, 5, 64} & set(range(1, M + 1))):
        answer = assert_answer(query, memory, {"top_k": k})
        assert torch.equal(answer, ops.memory_lookup(query, memory, k))


@pytest.mark.usefixtures("tiny_card")
def test_one_pass_of_any_strides_and_ties() -> None:
    query, memory = (coarse(x).half() for x in memories(10, 8, 14, 6))
    query = query.permute(1, 2, 0).contiguous().permute(2, 0, 1)[::3, ::2]
    memory = memory.mT.contiguous().mT[::2, 1::2].repeat(1, 3, 1)
    for k in (1, 3, 4, 7, 21):
        assert_answer(query, memory, {"top_k": k})


@pytest.mark.usefixtures("tiny_card")
@pytest.mark.parametrize("V", [1, 70])
def test_one_pass_of_values(V: int) -> None:
    assert_values(V, {"top_k": 4}, torch.float16)


@pytest.mark.usefixtures("tiny_card")
def test_one_pass_keeps_nan_within_its_row() -> None:
    assert_nan_stays({"top_k": 4}, dtype=torch.float16)


@pytest.mark.usefixtures("tiny_card", "inexact_exponentials")
@pytest.mark.parametrize("k", [2, 5])
def test_one_pass_never_keeps_the_kth(k: int) -> None:
    assert_kth_is_never_kept(100, k, torch.float16)


# --- more slots than registers hold ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("B", "N", "M", "C", "k"),
    [(1, 3, 513, 9, 1), (3, 1, 1031, 40, 5), (18, 2, 700, 17, 7), (1, 1, 2500, 3, 5)]
    + [(1, 1, 600, 5, 64)],
)
def test_search_equals_reference(B: int, N: int, M: int, C: int, k: int) -> None:
    assert_right(*memories(B, N, M, C), {"top_k": k})


@pytest.mark.usefixtures("tiny_card")
def test_search_by_one_program_alone() -> None:
    assert_right(*memories(2, 1, 777, 5), {"top_k": 5})


def test_search_of_values() -> None:
    assert_values(9, {"top_k": 5}, M=600)


@pytest.mark.usefixtures("inexact_exponentials")
@pytest.mark.parametrize("k", [2, 5])
def test_search_never_keeps_the_kth(k: int) -> None:
    assert_kth_is_never_kept(600, k)


def test_search_that_keeps_its_scores() -> None:
    assert_right(*memories(2, 1, 520, 530), {"top_k": 5})


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_search_in_half_precision(dtype: torch.dtype) -> None:
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    assert_right(*tensors(exact_memories(1, 4, (order - 300) / 64), dtype), {"top_k": 5})


def test_search_with_ties_across_tiles() -> None:
    query, memory = memories(2, 1, 6, 8)
    # The same six slots in every tile: all of the best are tied with the k-th.
    answer = assert_right(query, memory.repeat(1, 100, 1), {"top_k": 5})[0]
    assert (answer == 0).all()


def test_search_passes_nan_on_in_its_row_only() -> None:
    assert_nan_stays({"top_k": 5}, M=600)


# --- promises -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("parts")
@modes
def test_same_inputs_same_bits(mode: dict[str, Any]) -> None:
    query, memory = memories(33, 2, 40, 20)
    grad = normal(*query.shape, seed=99).to(query)
    first = assert_right(query, memory, mode, grad)
    second = with_gradients(lambda q, m: ops.memory_lookup(q, m, **mode), [query, memory], grad)
    assert all(map(torch.equal, first, second))


def test_small_batches_fill_the_card() -> None:
    # What is published, at the batch of the published training.
    N, M, C = 4, 200, 2048
    for gpu in (card.A100, card.H100):
        for R, S, T, most_parts in [(16, M, C, 32), (16, C, M, 1), (M, C, 16, 1)]:
            config = matrix_product.Config.choose(N, R, S, T, 2, gpu, most_parts)
            tiles = -(-R // config.block_r) * -(-S // config.block_s) * N
            assert tiles * config.parts >= 0.75 * gpu.multiprocessors
        assert memory_lookup.Config.choose(16, N, M, C, 2, gpu) is None
        assert memory_lookup.Config.choose(4096, N, M, C, 2, gpu)
