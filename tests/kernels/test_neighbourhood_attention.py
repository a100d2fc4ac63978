"""Neighbourhood attention's kernels against the reference in float64, through the public op."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops, reference
from squid_fast.kernels import card
from tests.kernels.devices import DTYPES, drawn
from tests.ops.samples import attention_inputs, compare, normal, with_gradients
from tests.tolerances import assert_close

NAMES = ("query", "key", "value", "pad_key", "pad_value")

pytestmark = pytest.mark.usefixtures("seeded")


def fast(num_heads: int) -> Callable[..., Tensor]:
    return lambda *x: ops.neighbourhood_attention(*x, num_heads)


def plain(num_heads: int) -> Callable[..., Tensor]:
    return lambda *x: reference.neighbourhood_attention(*x, num_heads)


def check(
    inputs: list[Tensor], num_heads: int, dtype: torch.dtype, tolerance: float | None = None
) -> None:
    # The floor: with P = 1 the gradient of the query cancels.
    compare(fast(num_heads), plain(num_heads), inputs, dtype, tolerance, floor=1.0)


def inputs_on(device: torch.device, B: int, P: int, C: int, scale: float = 1.0) -> list[Tensor]:
    return [x.to(device) for x in attention_inputs(B, P, C, scale)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "P", "heads", "width"),
    [
        (1, 1, 1, 1),
        (3, 1, 8, 5),
        (17, 2, 1, 1),
        (3, 2, 2, 17),
        (2, 2, 2, 256),  # as published, for radiographs
        (1, 2, 1, 2048),
        (3, 3, 3, 5),
        (1, 3, 16, 1),
        (2, 3, 2, 128),  # and for digits
        (1, 3, 1, 256),
        (1, 4, 2, 32),
        (1, 5, 1, 17),
    ],
)
def test_equals_reference(
    B: int, P: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(inputs_on(device, B, P, heads * width), heads, dtype)


@drawn
@given(
    B=st.integers(1, 5),
    P=st.integers(1, 4),
    heads=st.integers(1, 4),
    width=st.integers(1, 9),
    scale=st.sampled_from([0.1, 1.0]),
)
def test_at_drawn_sizes(
    B: int, P: int, heads: int, width: int, scale: float, device: torch.device
) -> None:
    check(inputs_on(device, B, P, heads * width, scale), heads, torch.float32)


@pytest.mark.parametrize("P", [2, 3])
def test_of_huge_scores(P: int, device: torch.device) -> None:
    # Scores of thousands overflow e^x without the usual subtraction, and are rounded to some 1e-4.
    check(inputs_on(device, 3, P, 16, scale=30.0), 2, torch.float32, tolerance=1e-3)


def test_where_the_padding_outweighs_by_far(device: torch.device) -> None:
    # In the middle of the grid the padding is no neighbour, and its score no measure for others.
    query, key, value, pad_key, pad_value = inputs_on(device, 2, 3, 8)
    inputs = [query.abs(), key, value, torch.full_like(pad_key, 300.0), pad_value]
    check(inputs, 2, torch.float32, tolerance=1e-4)
    out = fast(2)(*(x.float() for x in inputs))
    assert_close(out[:, [0, 1, 2, 3, 5, 6, 7, 8]], pad_value.float().expand(2, 8, 8))


def test_counts_the_places_outside(device: torch.device) -> None:
    # Equal scores: the answer is the mean over eight places.
    for P, outside in {1: [8], 2: [5] * 4, 3: [5, 3, 5, 3, 0, 3, 5, 3, 5]}.items():
        zero = torch.zeros(2, P * P, 2, device=device)
        pads = torch.zeros(2, device=device), torch.ones(2, device=device)
        expected = torch.tensor(outside, device=device)[None, :, None] / 8
        assert_close(fast(1)(zero, zero, zero, *pads), expected.expand(2, P * P, 2))


@pytest.mark.parametrize("P", [2, 3])
def test_of_any_layout(P: int, device: torch.device) -> None:
    B, C = 3, 24
    # Key and value as the model hands them over: halves of one tensor.
    query, (key, value) = normal(B, P * P, C), normal(B, P * P, 2 * C, seed=1).chunk(2, dim=-1)
    pads = normal(2 * C, seed=2).chunk(2)
    halves = [x.to(device) for x in (query, key, value, *pads)]
    check(halves, 3, torch.float32)
    assert halves[1].stride(1) == 2 * C
    # Patches before images, channels before patches, every other image, pads between others.
    query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in halves[:3])
    key = key.mT.contiguous().mT
    value = torch.stack([value, -value], dim=1).flatten(0, 1)[::2]
    assert key.stride(2) == P * P  # which rounding to float32 keeps
    pads = [torch.stack([x, -x], dim=-1)[:, 0] for x in halves[3:]]
    check([query, key, value, *pads], 3, torch.float32)
    check([query[:1].expand(B, -1, -1), key, value, *pads], 3, torch.float32)


def test_of_an_expanded_gradient(device: torch.device) -> None:
    inputs = inputs_on(device, 2, 3, 6)
    results = []
    for function, dtype in ((fast(2), torch.float32), (plain(2), torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        results.append(torch.autograd.grad(function(*leaves).sum(), leaves))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-5, floor=1.0)


def test_programs_that_serve_several_tiles(device: torch.device, monkeypatch) -> None:
    # On a GPU this takes thousands of images; on one with a single multiprocessor, a few.
    monkeypatch.setattr(card, "_inspect", lambda _: single)
    single = card.Card("sm_90", multiprocessors=1, shared_memory=0)
    with card.assume(single):
        check(inputs_on(device, 5, 2, 512), 8, torch.float32)  # 5 tiles, 2 to a program


def test_is_deterministic(device: torch.device) -> None:
    inputs = [x.float() for x in inputs_on(device, 5, 3, 24)]
    grad = normal(5, 9, 24).to(device)
    first, second = (with_gradients(fast(3), inputs, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


# NumPy, in the interpreter, about the largest of scores that are all NaN.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("P", [2, 4])
def test_passes_nan_on_to_those_who_attend_only(P: int, name: str, device: torch.device) -> None:
    B, N, C, heads = 3, P * P, 6, 2
    inputs = [x.float() for x in inputs_on(device, B, P, C)]
    clean = fast(heads)(*inputs).view(B, N, heads, -1)
    source = inputs[NAMES.index(name)]
    source[(1, 0, 1) if source.dim() == 3 else 1] = torch.nan
    out = fast(heads)(*inputs).view(B, N, heads, -1)
    near = [r * P + c for r, c in itertools.product(range(2), repeat=2) if (r, c) != (0, 0)]
    edge = [n for n in range(N) if n // P in (0, P - 1) or n % P in (0, P - 1)]
    hit = torch.zeros(B, N, heads, C // heads, dtype=torch.bool)
    if source.dim() == 3:
        hit[1, [0] if name == "query" else near, 0] = True
    else:
        hit[:, edge, 0] = True
    if "value" in name:
        hit[..., [0, 2]] = False  # a value's NaN stays in its channel
    hit = hit.to(device)
    assert torch.equal(out.isnan(), hit)
    assert torch.equal(out[~hit], clean[~hit])


def test_gradients_pass_nan_on_within_their_image_only(device: torch.device) -> None:
    inputs, grad = [x.float() for x in inputs_on(device, 3, 2, 6)], normal(3, 4, 6).to(device)
    clean = with_gradients(fast(2), inputs, grad)
    grad[1] = torch.nan
    for actual, before in zip(with_gradients(fast(2), inputs, grad)[1:4], clean[1:4], strict=True):
        assert actual[1].isnan().all()
        assert torch.equal(actual[[0, 2]], before[[0, 2]])


def test_opcheck(device: torch.device) -> None:
    inputs = [x.float().requires_grad_() for x in inputs_on(device, 2, 2, 4)]
    torch.library.opcheck(torch.ops.squid_fast.neighbourhood_attention, (*inputs, 2))
    inputs = [x.detach() for x in inputs]
    torch.library.opcheck(
        torch.ops.squid_fast.neighbourhood_attention_backward, (inputs[0], *inputs, 2)
    )
