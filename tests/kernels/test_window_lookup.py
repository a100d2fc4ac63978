"""The kernels of the window lookup against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from squid_fast import ops
from squid_fast.inference.windows import WindowMemory
from squid_fast.kernels import card, dispatch, kept_slots, window_lookup
from squid_fast.modules.memory import (
    MemoryMatrixBlock,
    MemoryMatrixBlockV3,
    MemoryMatrixBlockV4,
)
from tests.kernels.devices import DEVICE, DTYPES, drawn, tensors
from tests.ops.samples import SEEDS, looked_up_windows, normal, survivors, tied, up_to, window_maps
from tests.tolerances import TOLERANCES, assert_close

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
    assert not windows.serves(x.float())
    answer = windows(x)
    assert answer.is_contiguous(memory_format=torch.channels_last)
    assert_close(answer, block(x.float()), TOLERANCES[torch.float16])


@pytest.mark.parametrize(
    ("served", "changes"),
    [
        (True, {}),
        (False, {"dtype": torch.float32}),
        (False, {"top_k": 65}),
        (False, {"M": 513}),
        (False, {"B": 0}),
        (False, {"side": 2400}),
    ],
)
def test_the_rules(served: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    how = {"dtype": torch.float16, "top_k": 5, "M": 99, "B": 2, "side": 2} | changes
    B, M, side = how["B"], how["M"], how["side"]
    maps = torch.zeros((), dtype=how["dtype"]).expand(B, 3, side, side)
    slots = torch.zeros((), dtype=how["dtype"]).expand(1, 1, M, 3 * side * side)
    assert dispatch.serves_window_lookup(maps, slots, how["top_k"]) == served


def test_the_published_windows_fill_the_card() -> None:
    for gpu in (card.A100, card.H100):
        for images, (height, run) in [(i, w) for i in (1, 16, 256) for w in [(4, 1024), (8, 1024)]]:
            B, N, M = 4 * images, 4, 200
            config = window_lookup.Config.choose(B, N, M, height, run, 3, gpu)
            programs = -(-B // config.block_b) * N * config.splits
            rounds = math.ceil(programs / gpu.multiprocessors)
            assert programs >= 0.8 * rounds * gpu.multiprocessors
