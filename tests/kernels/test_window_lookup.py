"""The kernels of the window lookup against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from squid_fast import ops
from squid_fast.inference.inpainting import SplitMemory
from squid_fast.inference.windows import WindowMemory
from squid_fast.kernels import card, dispatch, kept_slots, window_lookup
from squid_fast.modules.memory import (
    MemoryMatrixBlock,
    MemoryMatrixBlockV3,
    MemoryMatrixBlockV4,
    MemoryQueue,
)
from tests.kernels.devices import DEVICE, DTYPES, ON_GPU, drawn, tensors
from tests.ops.samples import (
    SEEDS,
    looked_up_values,
    looked_up_windows,
    normal,
    survivors,
    tied,
    up_to,
    window_maps,
)
from tests.tolerances import TOLERANCES, assert_close, error

HALF = DTYPES[1:]


def layouts(maps: Tensor) -> dict[str, Tensor]:
    """The same maps [B, c, H, W] as they may lie in memory."""
    B, c, H, W = maps.shape
    taller = maps.new_full((B, 3 * H, W, c), torch.nan)
    taller[:, H : 2 * H] = maps.permute(0, 2, 3, 1)
    return {
        "channels-last": maps.contiguous(memory_format=torch.channels_last),
        "contiguous": maps.contiguous(),
        "rows of taller maps": taller[:, H : 2 * H].permute(0, 3, 1, 2),
        "every other": maps.repeat_interleave(2, dim=0).contiguous(
            memory_format=torch.channels_last
        )[::2],
        "turned": maps.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }


def assert_right(
    maps: Tensor, memory: Tensor, k: int, grid: tuple[int, int], parts: int = 3
) -> Tensor:
    """The answer to half-precision maps is the reference's from the unsplit memory."""
    slots = ops.split(memory.to(DEVICE), parts, maps.dtype)
    answer = ops.window_lookup(maps, slots, k, grid)
    assert answer.dtype == maps.dtype
    assert answer.is_contiguous(memory_format=torch.channels_last)
    expected = looked_up_windows(maps.cpu().double(), memory.double(), k, grid)
    assert_close(answer.cpu(), expected, floor=1.0)
    return answer


# c, H, W, grid: windows of one run and of many, runs that no step divides, of one number.
SIZES: list[tuple[int, int, int, tuple[int, int]]] = [
    (1, 1, 1, (1, 1)),
    (3, 2, 2, (2, 2)),
    (5, 3, 6, (3, 2)),
    (16, 4, 4, (2, 2)),
    (33, 6, 4, (3, 1)),
    (40, 2, 5, (1, 5)),
]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("B", "M"), [(1, 3), (17, 33), (3, 200), (140, 7), (2, 300)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_reference(
    size: tuple[int, int, int, tuple[int, int]], B: int, M: int, dtype: torch.dtype
) -> None:
    c, H, W, grid = size
    maps, memory = window_maps(B, c, H, W, M, grid)
    maps = maps.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    for k in sorted({1, 2, 5} & set(range(1, M + 1))):
        answer = assert_right(maps, memory, k, grid)
        assert bool((answer == 0).all()) == (k == 1)


@drawn
@given(
    B=up_to(40), c=up_to(20), height=up_to(3), width=up_to(3), M=up_to(40), k=up_to(64),
    grid=st.tuples(up_to(3), up_to(2)), parts=st.integers(2, 3), seed=SEEDS,
)  # fmt: skip
def test_drawn_sizes(
    B: int, c: int, height: int, width: int, M: int, k: int,
    grid: tuple[int, int], parts: int, seed: int,
) -> None:  # fmt: skip
    maps, memory = window_maps(B, c, grid[0] * height, grid[1] * width, M, grid, seed)
    # Slots of one direction and of different lengths: no two of them nearly tie.
    lengths = torch.linspace(0.5, 4, M)[torch.randperm(M)][:, None]
    memory = memory[:, :1] * lengths
    (maps,) = tensors([maps], torch.float16)
    assert_right(maps, memory, min(k, M), grid, parts)


@pytest.mark.parametrize("kind", layouts(torch.zeros(1, 1, 1, 1)))
def test_any_layout(kind: str) -> None:
    maps, memory = window_maps(5, 6, 4, 6, 20, (2, 3))
    (maps,) = tensors([maps], torch.float16)
    assert_right(layouts(maps)[kind], memory, 4, (2, 3))


def test_split_slots_are_as_good_as_float32() -> None:
    # Slots that differ by one part in 40,000, of which float16 does not know which is the best.
    maps, memory = window_maps(4, 32, 4, 4, 30, (2, 2))
    memory = memory[:, :1] * (1 + torch.arange(30.0)[:, None] / 40_000)
    # The first channel, which no query sees, names the slot.
    maps[:, 0] = 0
    memory[..., ::32] = torch.arange(30.0)[:, None]
    (maps,) = tensors([maps], torch.float16)
    expected = looked_up_windows(maps.cpu().double(), memory.double(), 2, (2, 2))

    def answer(parts: int) -> Tensor:
        slots = ops.split(memory.to(DEVICE), parts, torch.float16)
        return ops.window_lookup(maps, slots, 2, (2, 2)).cpu()

    assert_close(answer(3), expected)
    assert_close(answer(2), expected)
    assert (answer(1)[:, 0] - expected[:, 0]).abs().max() > 1


def test_scores_are_split_over_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, memory = window_maps(3, 64, 4, 4, 20, (1, 1))
    (maps,) = tensors([maps], torch.float16)
    choose = window_lookup.Config.choose
    found = []
    for splits in (1, 3, 5, 32):  # of 32 steps
        monkeypatch.setattr(
            window_lookup.Config, "choose", lambda *s, n=splits: replace(choose(*s), splits=n)
        )
        found.append(assert_right(maps, memory, 3, (1, 1)))
    for other in found[1:]:
        assert_close(other, found[0])


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_answers_are_shared_among_programs(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, memory = window_maps(70, 3, 2, 2, 9, (2, 1))  # three tiles of maps
    (maps,) = tensors([maps], torch.float16)
    choose = kept_slots.Config.choose
    monkeypatch.setattr(kept_slots.Config, "choose", lambda *s: replace(choose(*s), shares=shares))
    assert_right(maps, memory, 4, (2, 1))


def test_ties_all_go() -> None:
    # The maps are the scores of two numbers, and the answer to one that has no slot left is zero.
    logits = tied(24, 40, 4, seed=1)
    for k in (1, 3, 6, 20, 40):
        weights = weights_of(logits, k)
        assert torch.equal(weights > 0, survivors(logits, k))


@pytest.mark.usefixtures("inexact_exponentials")
@pytest.mark.parametrize("k", [2, 5, 64])
def test_the_kth_is_never_kept(k: int) -> None:
    logits = torch.linspace(-3, 3, 70).double()[normal(24, 70).argsort(dim=-1)]
    weights = weights_of(logits.half().double(), k)
    assert torch.equal(weights > 0, survivors(logits, k))
    assert_close(weights.float().sum(dim=1), torch.ones(24), TOLERANCES[torch.float16])


def weights_of(logits: Tensor, k: int) -> Tensor:
    """Weights [B, M] of such scores, read from the answers of slots that are the unit vectors."""
    M = logits.shape[1]
    (maps,) = tensors([logits[:, :, None, None]], torch.float16)
    slots = torch.eye(M, dtype=torch.float16, device=DEVICE)[None, None]
    return ops.window_lookup(maps, slots, k).cpu()[:, :, 0, 0]


def test_nan_stays_within_its_window() -> None:
    maps, memory = window_maps(5, 6, 4, 4, 20, (2, 2))
    (maps,) = tensors([maps], torch.float16)
    slots = ops.split(memory.to(DEVICE), 3, torch.float16)
    for k in (1, 4):
        clean = ops.window_lookup(maps, slots, k, (2, 2))
        spoilt = maps.clone()
        spoilt[2, 3, 1, 2] = torch.nan
        answer = ops.window_lookup(spoilt, slots, k, (2, 2))
        assert answer[2, :, :2, 2:].isnan().all()
        answer[2, :, :2, 2:] = clean[2, :, :2, 2:]
        assert torch.equal(answer, clean)


def test_same_inputs_same_bits() -> None:
    maps, memory = window_maps(33, 12, 4, 4, 40, (2, 2))
    (maps,) = tensors([maps], torch.float16)
    answers = [assert_right(maps, memory, 5, (2, 2)) for _ in range(2)]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("block", "c", "side"),
    [
        (MemoryMatrixBlock(12, 3 * 4, 4, 4), 3, 4),
        (MemoryMatrixBlockV3(12, 6 * 4, 4, 4), 6, 2),
        (MemoryMatrixBlockV4(12, 3 * 16, 4, 4), 3, 4),
    ],
    ids=lambda block: type(block).__name__,
)
def test_windows_of_a_frozen_memory_are_those_of_its_block(
    block: nn.Module, c: int, side: int
) -> None:
    block.memory.slots.data = 8 * normal(*block.memory.slots.shape).float()
    block.to(DEVICE).eval().requires_grad_(False)
    (x,) = tensors([normal(8, c, side, side)], torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    windows = WindowMemory(block, c, torch.float16)
    assert windows.serves(x)
    answer = windows(x)
    assert answer.is_contiguous(memory_format=torch.channels_last)
    assert_close(answer, block(x.float()), TOLERANCES[torch.float16])


@pytest.mark.parametrize(
    ("served", "changes"),
    [
        (True, {}),
        (True, {"dtype": torch.float32}),
        (True, {"dtype": torch.float32, "slots": torch.bfloat16}),
        (False, {"dtype": torch.float32, "slots": torch.float32}),
        (False, {"dtype": torch.float64}),
        (False, {"top_k": 65}),
        (False, {"M": 513}),
        (False, {"B": 0}),
        (False, {"side": 2400}),
    ],
)
def test_the_rules(served: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    how = {"dtype": torch.float16, "top_k": 5, "M": 99, "B": 2, "side": 2} | changes
    how = {"slots": torch.float16} | how
    B, M, side = how["B"], how["M"], how["side"]
    maps = torch.zeros((), dtype=how["dtype"]).expand(B, 3, side, side)
    slots = torch.zeros((), dtype=how["slots"]).expand(1, 1, M, 3 * side * side)
    assert dispatch.serves_window_lookup(maps, slots, how["top_k"]) == served


def test_the_published_windows_fill_the_card() -> None:
    # The decoder's windows, four maps to an image, and the queue's in float32.
    for B, height, run, size in [(4, 4, 1024, 2), (4, 8, 1024, 2), (1, 1, 2048, 4)]:
        for gpu, images in product((card.A100, card.H100), (1, 16, 256)):
            N, M = 4, 200
            config = window_lookup.Config.choose(B * images, N, M, height, run, 3, size, gpu)
            programs = -(-B * images // config.block_b) * N * config.splits
            rounds = math.ceil(programs / gpu.multiprocessors)
            assert programs >= 0.8 * rounds * gpu.multiprocessors


# --- maps in float32, split where they are multiplied ---------------------------------------------


@pytest.fixture
def units_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies bfloat16 as matrix units do, not its bits as integers."""
    if ON_GPU:
        return
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def queue(B: int, N: int, M: int, C: int, V: int = 0, seed: int = 0) -> list[Tensor]:
    """Query [B, N, C], slots [N, M, C] and values [N, M, V or C] in float32; no scores near a tie.

    Slots are of one direction at each place, and of different lengths.
    """
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    slots = normal(N, 1, C, seed=seed) / C**0.5 * torch.linspace(0.5, 4, M)[order][:, None]
    values = normal(N, M, V, seed=seed + 1) if V else slots
    return [x.float() for x in (normal(B, N, C, seed=seed + 2), slots, values)]


def asked(
    query: Tensor, slots: Tensor, k: int, values: Tensor | None, dtype: torch.dtype, parts: int = 3
) -> Tensor:
    """Answers [B, N, V], or without values [B, N, C] from the slots' parts."""
    maps = query.to(DEVICE)[:, None].permute(0, 3, 1, 2)
    split = ops.split(slots.to(DEVICE), parts, dtype)
    values = None if values is None else values.to(DEVICE)
    answer = ops.window_lookup(maps, split, k, (1, query.shape[1]), values)
    assert answer.dtype == torch.float32
    if values is not None:
        assert answer.is_contiguous()
        return answer.cpu()
    return answer.permute(0, 2, 3, 1)[:, 0].cpu()


@pytest.mark.usefixtures("units_of_bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [0, 1, 70], ids=lambda V: f"V={V}")
@pytest.mark.parametrize(
    ("B", "N", "M", "C"),
    [(1, 1, 1, 1), (1, 4, 3, 5), (17, 3, 33, 16), (3, 9, 200, 40), (140, 1, 7, 33), (2, 2, 300, 7)],
    ids=str,
)
def test_queries_in_float32(B: int, N: int, M: int, C: int, V: int, dtype: torch.dtype) -> None:
    query, slots, values = queue(B, N, M, C, V)
    for k in sorted({1, 2, 5} & set(range(1, M + 1))):
        answer = asked(query, slots, k, values if V else None, dtype)
        expected = looked_up_values(query.double(), slots.double(), values.double(), top_k=k)
        assert_close(answer, expected, 1e-5, floor=1.0)
        assert bool((answer == 0).all()) == (k == 1)


@pytest.mark.usefixtures("units_of_bfloat16")
@drawn
@given(
    B=up_to(40), N=up_to(4), M=up_to(40), C=up_to(70), V=up_to(70), k=up_to(64), seed=SEEDS,
)  # fmt: skip
def test_drawn_queries(B: int, N: int, M: int, C: int, V: int, k: int, seed: int) -> None:
    query, slots, values = queue(B, N, M, C, V, seed)
    answer = asked(query, slots, min(k, M), values, torch.bfloat16)
    wide = (x.double() for x in (query, slots, values))
    assert_close(answer, looked_up_values(*wide, top_k=min(k, M)), floor=1.0)


@pytest.mark.usefixtures("units_of_bfloat16")
def test_three_parts_of_bfloat16_are_float32_and_fewer_are_not() -> None:
    # All slots but the least one are kept, so that nothing depends on a choice.
    query, slots, values = queue(30, 4, 12, 50, 20)
    for given_values in (values, None):
        summed = slots if given_values is None else values
        wide = (x.double() for x in (query, slots, summed))
        expected = looked_up_values(*wide, top_k=12)
        found = [
            error(asked(query, slots, 12, given_values, torch.bfloat16, parts), expected)
            for parts in (1, 2, 3)
        ]
        assert found[0] > 100 * found[1]
        assert found[1] > 5 * found[2]
        assert found[2] < 1e-6


@pytest.mark.usefixtures("units_of_bfloat16")
def test_scores_that_differ_in_the_last_bit_are_told_apart() -> None:
    # Queries are the scores, since slots are the unit vectors; each has bits in all three parts.
    M, k, least = 40, 9, 8 + 2**-5
    query = least + normal(24, 1, M).argsort(dim=-1).float() * 2**-20
    query[12:].clamp_(max=least + (M - k) * 2**-20)  # k tie for the first place, and all go
    kept, slots = survivors(query[:, 0].double(), k), torch.eye(M)[None]
    assert (kept.sum(dim=1) == torch.tensor([k - 1] * 12 + [0] * 12)).all()

    def right(parts: int) -> bool:
        answer = asked(query, slots, k, slots, torch.bfloat16, parts)
        return torch.equal(answer[:, 0] > 0, kept)

    assert [right(parts) for parts in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize("kind", layouts(torch.zeros(1, 1, 1, 1)))
def test_any_layout_in_float32(kind: str) -> None:
    maps, memory = window_maps(5, 6, 4, 6, 20, (2, 3))
    maps = layouts((maps + 2**-13).float().to(DEVICE))[kind]
    answer = ops.window_lookup(maps, ops.split(memory.to(DEVICE), 3, torch.float16), 4, (2, 3))
    assert answer.is_contiguous(memory_format=torch.channels_last)
    expected = looked_up_windows(maps.cpu().double(), memory.double(), 4, (2, 3))
    assert_close(answer.cpu(), expected, floor=1.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_stays_with_its_query(bad: float) -> None:
    query, slots, values = queue(5, 4, 20, 12, 9)
    for given_values in (values, None):
        clean = asked(query, slots, 4, given_values, torch.float16)
        spoilt = query.clone()
        spoilt[2, 3, 5] = bad
        answer = asked(spoilt, slots, 4, given_values, torch.float16)
        assert answer[2, 3].isnan().all()
        answer[2, 3] = clean[2, 3]
        assert torch.equal(answer, clean)


def test_same_queries_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    query, slots, values = queue(33, 3, 40, 130, 30)
    choose, found = window_lookup.Config.choose, []
    for splits in (3, 3, 1):
        monkeypatch.setattr(
            window_lookup.Config, "choose", lambda *s, n=splits: replace(choose(*s), splits=n)
        )
        found.append(asked(query, slots, 5, values, torch.float16))
    assert torch.equal(found[0], found[1])
    assert_close(found[2], found[0])


@pytest.mark.usefixtures("units_of_bfloat16")
def test_a_split_queue_answers_as_the_queue() -> None:
    plain, (query, slots, values) = MemoryQueue(20, 12, 4, 3), queue(5, 3, 20, 12, 36)
    plain.slots.copy_(slots)
    plain.to(DEVICE).eval()
    memory = SplitMemory(plain)
    query, values = query.to(DEVICE), values.to(DEVICE)
    assert memory.slots is plain.slots
    for given_values in (None, values):
        expected = plain.look_up(query, given_values)
        found = memory.look_up(query, given_values)
        assert not torch.equal(found, expected)  # other products, the same to float32
        assert_close(found, expected)
    assert torch.equal(memory(query), memory.look_up(query))
