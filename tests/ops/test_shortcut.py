"""The masked shortcut: values, gradients, the draw, edges; against the reference in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from squid_fast import ops, reference
from squid_fast.ops import shortcut
from squid_fast.ops.philox import philox_uniform
from squid_fast.ops.shortcut import shortcut_mask
from tests.ops.samples import (
    DTYPES,
    assert_backward_repeats_the_draw,
    blend,
    compare,
    normal,
    shortcut_of,
    with_gradients,
)
from tests.tolerances import TOLERANCES


def mask_of(shape: tuple[int, ...], keep: float, seed: Tensor | None = None) -> Tensor:
    """What ``masked_shortcut`` drew, read off its result: True where it took ``inpainted``."""
    return ops.masked_shortcut(torch.ones(shape), torch.zeros(shape), keep, seed) == 1


def with_mask(mask: Tensor, inpainted: Tensor, shortcut: Tensor) -> Tensor:
    return reference.masked_shortcut(inpainted, shortcut, 0.5, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 2), (2, 17, 3, 33), (0, 3, 4, 4)])
def test_shortcut_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    seed = torch.tensor(1234)
    mask = shortcut_mask(seed, shape, 0.6)
    assert mask.shape == (shape[0], 1, *shape[2:])
    maps = [normal(*shape, seed=s).to(dtype) for s in range(2)]
    compare(shortcut_of(0.6, seed), partial(with_mask, mask), maps, tolerance=0.0)


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


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_shortcut_backward_uses_the_draw_of_the_forward(affine: bool) -> None:
    assert_backward_repeats_the_draw(affine, "cpu")


@pytest.mark.parametrize("keep", [0, 1, 0.0, 1.0])
def test_shortcut_is_exact_when_open_or_closed(keep: float) -> None:
    inpainted, shortcut = normal(4, 3, 64, 64), normal(4, 3, 64, 64, seed=1)
    out = ops.masked_shortcut(inpainted, shortcut, keep)
    assert torch.equal(out, inpainted if keep else shortcut)


@pytest.mark.parametrize("word", [0, 2**31 - 1])
def test_shortcut_is_exact_for_the_extreme_draws(word: int, monkeypatch) -> None:
    # Both come up once in 2^31 positions.
    draw = torch.tensor(word).float() * 4.6566127342e-10
    monkeypatch.setattr(shortcut, "philox_uniform", lambda seed, count: draw.expand(count))
    assert not mask_of((1, 1, 2, 2), 0.0).any()
    assert mask_of((1, 1, 2, 2), 1.0).all()


def affine_inputs() -> list[Tensor]:
    return [normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1), normal(3, seed=2), normal(3, seed=3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_shortcut_with_the_affine_in_front(layout: torch.memory_format, dtype: torch.dtype) -> None:
    seed = torch.tensor(11)
    mask = shortcut_mask(seed, (2, 3, 4, 5), 0.6)
    x, y, *affine = affine_inputs()
    maps = [z.to(dtype).to(memory_format=layout) for z in (x, y)]
    out = compare(
        shortcut_of(0.6, seed),
        partial(blend, mask),
        [*maps, *affine],
        tolerance=TOLERANCES[dtype],
        floor=1.0,
    )[0]
    assert out.is_contiguous(memory_format=layout)


def test_shortcut_affine_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in affine_inputs()]
    assert torch.autograd.gradcheck(shortcut_of(0.6, torch.tensor(5)), inputs)


def test_shortcut_ignores_what_it_does_not_choose() -> None:
    ones = torch.ones(2, 3, 8, 8)
    assert torch.equal(ops.masked_shortcut(ones * torch.nan, ones, 0.0), ones)


@pytest.mark.parametrize("other", [torch.channels_last, torch.contiguous_format], ids=str)
def test_shortcut_in_channels_last(other: torch.memory_format) -> None:
    a, b, grad = (normal(2, 5, 6, 4, seed=s) for s in range(3))
    call, last = shortcut_of(0.5, torch.tensor(7)), {"memory_format": torch.channels_last}
    expected = with_gradients(call, [a, b], grad)
    actual = with_gradients(call, [a.to(**last), b.to(memory_format=other)], grad.to(**last))
    assert all(map(torch.equal, actual, expected))
    assert actual[0].is_contiguous(**last)


def test_shortcut_of_strided_maps() -> None:
    seed = torch.tensor(11)
    a, b = normal(4, 6, 10, 8)[::2, ::3, 1::2, :], normal(1, 1, 1, 8).expand(2, 2, 5, 8)
    mask = shortcut_mask(seed, (2, 2, 5, 8), 0.5)
    compare(shortcut_of(0.5, seed), partial(with_mask, mask), [a, b], tolerance=0.0)


def test_shortcut_gradcheck() -> None:
    inputs = [normal(2, 2, 3, 3, seed=s).requires_grad_() for s in range(2)]
    assert torch.autograd.gradcheck(shortcut_of(0.5, torch.tensor(5)), inputs)


def test_shortcut_numbers_by_the_published_algorithm() -> None:
    # Philox 4x32-10 of a zero key and a zero counter: Random123's known answer, word 0.
    word = 0x6627E8D5
    expected = torch.tensor(word, dtype=torch.float32) * 4.6566127342e-10
    assert philox_uniform(torch.tensor(0), 1)[0] == expected
