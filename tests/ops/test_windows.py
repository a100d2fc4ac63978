"""The lookup of windows, and how much of float32 is left in split slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops
from tests.ops.samples import (
    SEEDS,
    looked_up_values,
    looked_up_windows,
    normal,
    survivors,
    up_to,
    window_maps,
)
from tests.tolerances import assert_close


@settings(max_examples=50, deadline=None)
@given(
    B=st.integers(0, 5), c=up_to(5), height=up_to(3), width=up_to(3), M=up_to(20), k=up_to(20),
    grid=st.tuples(up_to(3), up_to(3)), seed=SEEDS,
)  # fmt: skip
def test_equals_the_reference(
    B: int, c: int, height: int, width: int, M: int, k: int, grid: tuple[int, int], seed: int
) -> None:
    maps, memory = window_maps(B, c, grid[0] * height, grid[1] * width, M, grid, seed)
    expected = looked_up_windows(maps, memory.double(), min(k, M), grid)
    answer = ops.window_lookup(maps, ops.split(memory.double(), 3, torch.float64), min(k, M), grid)
    assert answer.permute(0, 2, 3, 1).is_contiguous()
    assert_close(answer, expected, floor=1.0)


def test_maps_in_float32_are_not_rounded_to_the_parts_of_slots() -> None:
    maps, memory = window_maps(6, 8, 4, 6, 20, (2, 3))
    maps = (maps + 2**-12).float()
    for dtype in (torch.bfloat16, torch.float32):
        answer = ops.window_lookup(maps, ops.split(memory, 3, dtype), 4, (2, 3))
        assert answer.dtype == torch.float32
        assert_close(answer, looked_up_windows(maps.double(), memory.double(), 4, (2, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_are_summed_in_place_of_the_slots(dtype: torch.dtype) -> None:
    maps, memory = window_maps(5, 3, 4, 6, 20, (2, 3))
    maps, values = maps.to(dtype), normal(6, 20, 7, seed=4)
    values = values.to(torch.promote_types(dtype, torch.float32))
    kind = torch.float64 if dtype == torch.float64 else torch.bfloat16
    slots = ops.split(memory.to(values.dtype), 3, kind)
    answer = ops.window_lookup(maps, slots, 4, (2, 3), values)
    assert (answer.shape, answer.dtype) == ((5, 6, 7), values.dtype)
    windows = maps.double().unflatten(3, (3, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1)
    query = windows.reshape(5, 6, 12)
    assert_close(answer, looked_up_values(query, memory.double(), values.double(), top_k=4))


def test_bfloat16_is_float32_rounded() -> None:
    maps, memory = window_maps(6, 8, 4, 6, 20, (2, 3))
    maps = maps.bfloat16()
    answer = ops.window_lookup(maps, ops.split(memory, 3), 4, (2, 3))
    exact = looked_up_windows(maps.float(), memory, 4, (2, 3)).bfloat16()
    assert answer.dtype == torch.bfloat16
    assert_close(answer, exact, 2**-8)
    assert (answer == exact).double().mean() > 0.99  # but for sums next to a rounding's border


def test_three_parts_of_bfloat16_are_float32() -> None:
    x = normal(1000).float() * 10.0 ** torch.linspace(-20, 20, 1000)
    parts = ops.split(x, 3)
    assert (parts.shape, parts.dtype) == ((3, 1000), torch.bfloat16)
    assert torch.equal(parts.double().sum(dim=0), x.double())
    assert torch.equal(parts.float().sum(dim=0), x)
    for count, bits in ((1, 8), (2, 16)):
        left = ops.split(x, count).double().sum(dim=0) - x.double()
        assert (left.abs() <= 2.0**-bits * x.double().abs()).all()


@pytest.mark.parametrize("C", [4096, 8192])
def test_scores_of_split_slots_rank_as_those_of_float32(C: int) -> None:
    # As the matrix units compute them: products of bfloat16 numbers, added up in float32.
    maps, k = normal(64, C).relu().bfloat16(), 5
    memory = (torch.rand(200, C, generator=torch.Generator().manual_seed(1)) * 2 - 1) / C**0.5
    exact = maps.double() @ memory.double().T

    def scores(parts: int) -> Tensor:
        split = ops.split(memory, parts).float()
        return sum((maps.float() @ part.T for part in split), torch.zeros(64, 200))

    def error(found: Tensor) -> float:
        return float((found.double() - exact).abs().max())

    plain = maps.float() @ memory.T
    assert error(scores(3)) < 2 * error(plain)
    assert error(scores(2)) > 2 * error(plain)  # 16 bits are not enough
    assert torch.equal(survivors(scores(3).double(), k), survivors(exact, k))
    assert not torch.equal(survivors(scores(1).double(), k), survivors(exact, k))


def test_scores_of_six_products_rank_as_those_of_float32() -> None:
    # Of queries in float32, split like the slots: the products left out are beyond float32's bits.
    C, k = 2048, 5
    query = normal(64, C).relu().float()
    memory = (torch.rand(200, C, generator=torch.Generator().manual_seed(1)) * 2 - 1) / C**0.5
    exact = query.double() @ memory.double().T

    def scores(parts: int) -> Tensor:
        xs, ys = ops.split(query, parts).float(), ops.split(memory, parts).float()
        products = [xs[i] @ ys[j].T for i in range(parts) for j in range(parts - i)]
        return sum(products, torch.zeros(64, 200))

    def error(found: Tensor) -> float:
        return float((found.double() - exact).abs().max())

    plain = query @ memory.T
    assert error(scores(3)) < 2 * error(plain)
    assert error(scores(2)) > 4 * error(plain)
    assert error(scores(1)) > 500 * error(plain)
    assert torch.equal(survivors(scores(3).double(), k), survivors(exact, k))
    assert not torch.equal(survivors(scores(1).double(), k), survivors(exact, k))


def test_nan_stays_within_its_window() -> None:
    maps, memory = window_maps(3, 2, 4, 4, 10, (2, 2))
    slots = memory.double()[None]
    clean = ops.window_lookup(maps, slots, 4, (2, 2))
    maps[1, 1, 3, 0] = torch.nan
    answer = ops.window_lookup(maps, slots, 4, (2, 2))
    assert answer[1, :, 2:, :2].isnan().all()
    answer[1, :, 2:, :2] = clean[1, :, 2:, :2]
    assert torch.equal(answer, clean)


def test_compiled_equals_eager() -> None:
    torch.compiler.reset()
    maps, memory = window_maps(3, 2, 4, 4, 10, (2, 2))
    slots, values = ops.split(memory, 3), normal(4, 10, 5).float()

    def call(x: Tensor) -> list[Tensor]:
        return [ops.window_lookup(x, slots, 4, (2, 2), v) + 1 for v in (None, values)]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for x in (maps.bfloat16(), maps.float()):
        assert all(map(torch.equal, compiled(x), call(x)))
