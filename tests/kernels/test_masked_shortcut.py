"""The masked shortcut's kernels against float64, and what the draw promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops
from squid_fast.ops.philox import philox_uniform
from squid_fast.ops.shortcut import shortcut_mask
from tests.kernels.devices import DTYPES, drawn
from tests.ops.samples import normal, with_gradients
from tests.tolerances import TOLERANCES, assert_close

SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 17, 13),
    (3, 37, 1, 5),
    (2, 37, 17, 13),
    (2, 70, 4, 4),  # more channels than a tile
    (5, 3, 31, 29),  # more positions than a tile
]
SEED = 2**61 + 12345  # both of its words count

pytestmark = pytest.mark.usefixtures("seeded")


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def turned(x: Tensor) -> Tensor:
    """Dense, but rows and columns lie in memory the other way round."""
    return x.mT.contiguous().mT


def strided(x: Tensor) -> Tensor:
    """Every second row and every third column of something larger, channels last."""
    B, C, H, W = x.shape
    larger = x.new_full((B, 2 * H, 3 * W, C), torch.nan).permute(0, 3, 1, 2)
    return larger[:, :, ::2, ::3].copy_(x)


def expanded(x: Tensor) -> Tensor:
    """One row's values for all, in the whole batch."""
    return x[:1, :, :1].expand(x.shape)


LAYOUTS = [contiguous, channels_last, turned, strided, expanded]


def blend(mask: Tensor, *maps: Tensor) -> Tensor:
    """The formula, of inpainted, shortcut and, where given, scale and shift."""
    inpainted, shortcut, *affine = maps
    if affine:
        scale, shift = (z[:, None, None] for z in affine)
        inpainted = (inpainted * scale + shift).relu()
    return torch.where(mask, inpainted, shortcut)


def shortcut_of(keep: float, seed: Tensor) -> Callable[..., Tensor]:
    """The operation as a function of the tensors that have a gradient."""

    def call(x: Tensor, y: Tensor, scale: Tensor | None = None, shift: Tensor | None = None):
        return ops.masked_shortcut(x, y, keep, seed, scale=scale, shift=shift)

    return call


def samples(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Inpainted, shortcut, scale, shift and an upstream gradient."""
    C = shape[1]
    maps = [normal(*shape, seed=seed).to(dtype) for seed in (0, 1, 4)]
    affine = [normal(C, seed=2).float(), normal(C, seed=3).float()]
    return [x.to(device) for x in (*maps[:2], *affine, maps[2])]


def assert_right(inputs: list[Tensor], keep: float, grad: Tensor) -> None:
    """Value and gradients are those of the formula in float64, exactly so without an affine."""
    seed = torch.tensor(SEED, device=grad.device)
    mask = shortcut_mask(seed, tuple(grad.shape), keep)
    actual = with_gradients(shortcut_of(keep, seed), inputs, grad)
    wide = [x.double() for x in inputs]
    expected = with_gradients(lambda *x: blend(mask, *x), wide, grad.double())
    of_rounded = TOLERANCES[grad.dtype]
    # What scale and shift get is a float32 sum, of terms that may cancel.
    terms = mask.sum().clamp_min(1).sqrt().item()
    for i, (got, value) in enumerate(zip(actual, expected, strict=True)):
        if len(inputs) == 2:
            assert torch.equal(got, value.to(got.dtype))
        elif i < 3:
            assert_close(got, value, of_rounded)
        else:
            assert got.dtype == torch.float32
            assert_close(got, value, TOLERANCES[torch.float32], floor=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor],
    affine: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    x, y, scale, shift, grad = samples(shape, dtype, device)
    inputs = [layout(x), layout(y)] + [scale, shift] * affine
    assert_right(inputs, 0.3 if dtype == torch.float32 else 0.95, layout(grad))


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(LAYOUTS, 2)))
def test_any_two_layouts(
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
    affine: bool,
    device: torch.device,
) -> None:
    x, y, scale, shift, grad = samples((2, 5, 6, 7), torch.float32, device)
    inputs = [first(x), second(y)] + [scale, shift[:1].expand(5)] * affine
    assert_right(inputs, 0.6, second(grad))


def significant(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@drawn
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    keep=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    affine=st.booleans(),
)
def test_drawn_sizes(
    shape: tuple[int, ...],
    layouts: tuple[Callable[[Tensor], Tensor], ...],
    keep: float,
    affine: bool,
    device: torch.device,
) -> None:
    x, y, scale, shift, grad = samples(shape, torch.float32, device)
    x, y = layouts[0](x), layouts[1](y)
    assert_right([x, y] + [scale, shift] * affine, keep, layouts[0](grad))
    # The fakes promise the strides of torch.where.
    out = shortcut_of(keep, torch.tensor(SEED, device=device))(x, y)
    assert significant(out) == significant(torch.where(x[:, :1].bool(), x, y))


# --- the draw -------------------------------------------------------------------------------------


def mask_of(
    shape: tuple[int, ...],
    keep: float,
    device: torch.device,
    seed: int | None = None,
    layout: Callable[[Tensor], Tensor] = contiguous,
) -> Tensor:
    """What a kernel drew, read off its result: True where it took ``inpainted``."""
    ones, zeros = (layout(f(shape, device=device)) for f in (torch.ones, torch.zeros))
    given_seed = None if seed is None else torch.tensor(seed, device=device)
    return ops.masked_shortcut(ones, zeros, keep, given_seed) == 1


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**40 + 2**33 + 77, 2**62 - 1, -1])
def test_mask_is_that_of_pytorch(
    seed: int, layout: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    shape = (3, 2, 33, 31)
    for keep in (0.3, 0.5, 0.95):
        expected = shortcut_mask(torch.tensor(seed, device=device), shape, keep)
        assert torch.equal(mask_of(shape, keep, device, seed, layout), expected.expand(shape))


def test_draw_at_the_probability_itself_is_not_kept(device: torch.device) -> None:
    # Were either compared in another precision, the draw that equals the probability would tell.
    draws = philox_uniform(torch.tensor(SEED), 64)
    for place in range(8):
        expected = (draws < draws[place]).view(1, 1, 8, 8).to(device)
        assert not expected.view(-1)[place]
        assert torch.equal(mask_of((1, 1, 8, 8), draws[place].item(), device, SEED), expected)


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
def test_rate(keep: float, device: torch.device) -> None:
    mask = mask_of((4, 1, 128, 128), keep, device)
    deviation = (keep * (1 - keep) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - keep) < 4.5 * deviation


def test_positions_are_independent(device: torch.device) -> None:
    mask = mask_of((6, 1, 64, 64), 0.5, device).double() - 0.5
    # Neighbours of every kind, and what lies one tile or half the batch away.
    for shift in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 2), (0, 32, 0), (3, 0, 0)]:
        product = mask[:, 0] * mask[:, 0].roll(shift, (0, 1, 2))
        assert abs(product.mean().item()) < 4.5 * 0.25 / mask.numel() ** 0.5, shift


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_channels_share_a_draw(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    mask = mask_of((3, 130, 5, 5), 0.5, device, layout=layout)  # three tiles of channels
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    assert 0 < mask.sum() < mask.numel()


def test_every_call_draws_anew(device: torch.device) -> None:
    first, second = (mask_of((2, 1, 32, 32), 0.5, device) for _ in range(2))
    # Two fair draws differ in half of the places.
    assert abs((first != second).double().mean().item() - 0.5) < 4.5 * 0.5 / 2048**0.5


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_backward_repeats_the_draw(affine: bool, device: torch.device) -> None:
    shape = (2, 3, 16, 16)
    inpainted, shortcut = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    inpainted.requires_grad_(), shortcut.requires_grad_()
    scale = torch.full((3,), 2.0, device=device) if affine else None
    shift = torch.full((3,), -1.0, device=device) if affine else None
    out = ops.masked_shortcut(inpainted, shortcut, 0.5, scale=scale, shift=shift)
    ops.masked_shortcut(inpainted, shortcut, 0.5)  # another draw in between
    grad = normal(*shape).float().to(device)
    kept, passed = torch.autograd.grad(out, (inpainted, shortcut), grad)
    assert torch.equal(kept, (2 if affine else 1) * torch.where(out == 1, grad, 0.0))
    assert torch.equal(passed, torch.where(out == 1, 0.0, grad))


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 1.0])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_nothing_or_everything_is_kept(
    layout: Callable[[Tensor], Tensor], keep: float, device: torch.device
) -> None:
    x, y, *_, grad = samples((2, 3, 32, 33), torch.float32, device)
    call = shortcut_of(keep, torch.tensor(SEED, device=device))
    out, kept, passed = with_gradients(call, [layout(x), layout(y)], layout(grad))
    assert torch.equal(out, x if keep else y)
    assert torch.equal(kept, grad * keep)
    assert torch.equal(passed, grad * (1 - keep))


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_nan_that_is_not_chosen_reaches_nothing(
    layout: Callable[[Tensor], Tensor], affine: bool, device: torch.device
) -> None:
    shape, keep, seed = (2, 5, 9, 7), 0.5, torch.tensor(SEED, device=device)
    mask = shortcut_mask(seed, shape, keep)
    x, y, scale, shift, grad = samples(shape, torch.float32, device)
    clean, poisoned = (
        with_gradients(
            shortcut_of(keep, seed),
            [layout(x.where(mask, rest)), layout(y.where(~mask, rest))] + [scale, shift] * affine,
            layout(grad),
        )
        for rest in (1.0, torch.nan)
    )
    for got, value in zip(poisoned, clean, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_nan_that_is_chosen_stays(affine: bool, device: torch.device) -> None:
    x, y, scale, shift, _ = samples((1, 2, 3, 3), torch.float32, device)
    seed = torch.tensor(SEED, device=device)
    out = shortcut_of(1.0, seed)(x * torch.nan, y, *[scale, shift] * affine)
    assert out.isnan().all()


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_same_bits_every_time(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x, y, scale, shift, grad = samples((1, 66, 31, 7), torch.float16, device)
    call = shortcut_of(0.95, torch.tensor(SEED, device=device))
    inputs = [layout(x), layout(y), scale, shift]
    for a, b in zip(*(with_gradients(call, inputs, grad) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("layout", "affine"), [(contiguous, False), (channels_last, True), (strided, True)]
)
def test_opcheck(layout: Callable[[Tensor], Tensor], affine: bool, device: torch.device) -> None:
    x, y, scale, shift, grad = samples((2, 3, 4, 5), torch.float32, device)
    last = (scale, shift) if affine else (None, None)
    draw = (0.5, torch.tensor(SEED, device=device), *last)
    x, y, grad = layout(x), layout(y), layout(grad)
    leaves = [z.detach().requires_grad_() for z in (x, y)]
    torch.library.opcheck(torch.ops.squid_fast.masked_shortcut, (*leaves, *draw))
    torch.library.opcheck(
        torch.ops.squid_fast.masked_shortcut_backward, (grad, x if affine else None, *draw)
    )
