"""Neighbourhood attention's kernels against the reference in float64, through the public op."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops
from squid_fast.kernels import card
from tests.kernels.devices import DEVICE, DTYPES, drawn, tensors
from tests.ops.samples import attention_inputs, compare_attention, normal, up_to, with_gradients
from tests.tolerances import assert_close

NAMES = ("query", "key", "value", "pad_key", "pad_value")


def fast(inputs: list[Tensor], heads: int) -> Tensor:
    return ops.neighbourhood_attention(*inputs, heads)


def inputs_on_device(
    B: int, P: int, C: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return tensors(attention_inputs(B, P, C, scale), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "P", "heads", "width"),
    [(1, 1, 1, 1), (3, 1, 8, 5), (17, 2, 1, 1), (3, 2, 2, 17)]
    + [(2, 2, 2, 256), (1, 2, 1, 2048)]  # the former as published, for radiographs
    + [(3, 3, 3, 5), (1, 3, 16, 1), (1, 3, 1, 256), (1, 4, 2, 32), (1, 5, 1, 17)]
    + [(2, 3, 2, 128)],  # and for digits
)
def test_equals_reference(B: int, P: int, heads: int, width: int, dtype: torch.dtype) -> None:
    compare_attention(inputs_on_device(B, P, heads * width, dtype=dtype), heads)


@drawn
@given(B=up_to(5), P=up_to(4), heads=up_to(4), width=up_to(9), scale=st.sampled_from([0.1, 1.0]))
def test_at_drawn_sizes(B: int, P: int, heads: int, width: int, scale: float) -> None:
    compare_attention(inputs_on_device(B, P, heads * width, scale), heads)


@pytest.mark.parametrize("P", [2, 3])
def test_of_huge_scores(P: int) -> None:
    # Scores of thousands overflow e^x without the usual subtraction, and are rounded to some 1e-4.
    compare_attention(inputs_on_device(3, P, 16, scale=30.0), 2, tolerance=1e-3)


def test_where_the_padding_outweighs_by_far() -> None:
    # In the middle of the grid the padding is no neighbour, and its score no measure for others.
    query, key, value, pad_key, pad_value = inputs_on_device(2, 3, 8)
    inputs = [query.abs(), key, value, torch.full_like(pad_key, 300.0), pad_value]
    out = compare_attention(inputs, 2, tolerance=1e-4)[0]
    assert_close(out[:, [0, 1, 2, 3, 5, 6, 7, 8]], pad_value.expand(2, 8, 8))


def test_counts_the_places_outside() -> None:
    # Equal scores: the answer is the mean over eight places.
    for P, outside in {1: [8], 2: [5] * 4, 3: [5, 3, 5, 3, 0, 3, 5, 3, 5]}.items():
        zero, no, one = tensors([torch.zeros(2, P * P, 2), torch.zeros(2), torch.ones(2)])
        expected = torch.tensor(outside, device=DEVICE)[None, :, None] / 8
        assert_close(fast([zero, zero, zero, no, one], 1), expected.expand(2, P * P, 2))


@pytest.mark.parametrize("P", [2, 3])
def test_of_any_layout(P: int) -> None:
    B, C = 3, 24
    # Key and value as the model hands them over: halves of one tensor.
    query, both, pads = tensors(
        [normal(B, P * P, C), normal(B, P * P, 2 * C, seed=1), normal(2 * C, seed=2)]
    )
    halves = [query, *both.chunk(2, dim=-1), *pads.chunk(2)]
    compare_attention(halves, 3)
    # Patches before images, channels before patches, every other image, pads between others.
    query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in halves[:3])
    key = key.mT.contiguous().mT
    value = torch.stack([value, -value], dim=1).flatten(0, 1)[::2]
    between = [torch.stack([x, -x], dim=-1)[:, 0] for x in halves[3:]]
    compare_attention([query, key, value, *between], 3)
    compare_attention([query[:1].expand(B, -1, -1), key, value, *between], 3)


def test_of_an_expanded_gradient() -> None:
    one = torch.ones((), device=DEVICE)
    compare_attention(inputs_on_device(2, 3, 6), 2, grad=one.expand(2, 9, 6))


def test_programs_that_serve_several_tiles(monkeypatch) -> None:
    # On a GPU this takes thousands of images; on one with a single multiprocessor, a few.
    monkeypatch.setattr(card, "_inspect", lambda _: single)
    single = card.Card("sm_90", multiprocessors=1, shared_memory=0)
    with card.assume(single):
        compare_attention(inputs_on_device(5, 2, 512), 8)  # 5 tiles, 2 to a program


def test_is_deterministic() -> None:
    inputs, (grad,) = inputs_on_device(5, 3, 24), tensors([normal(5, 9, 24)])
    function = partial(ops.neighbourhood_attention, num_heads=3)
    assert all(map(torch.equal, *(with_gradients(function, inputs, grad) for _ in range(2))))


# NumPy, in the interpreter, about the largest of scores that are all NaN.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("P", [2, 4])
def test_passes_nan_on_to_those_who_attend_only(P: int, name: str) -> None:
    B, N, C, heads = 3, P * P, 6, 2
    inputs = inputs_on_device(B, P, C)
    clean = fast(inputs, heads).view(B, N, heads, -1)
    source = inputs[NAMES.index(name)]
    source[(1, 0, 1) if source.dim() == 3 else 1] = torch.nan
    out = fast(inputs, heads).view(B, N, heads, -1)
    near = [r * P + c for r, c in itertools.product(range(2), repeat=2) if (r, c) != (0, 0)]
    edge = [n for n in range(N) if n // P in (0, P - 1) or n % P in (0, P - 1)]
    hit = torch.zeros(B, N, heads, C // heads, dtype=torch.bool, device=DEVICE)
    if source.dim() == 3:
        hit[1, [0] if name == "query" else near, 0] = True
    else:
        hit[:, edge, 0] = True
    if "value" in name:
        hit[..., [0, 2]] = False  # a value's NaN stays in its channel
    assert torch.equal(out.isnan(), hit)
    assert torch.equal(out[~hit], clean[~hit])


def test_gradients_pass_nan_on_within_their_image_only() -> None:
    inputs, (grad,) = inputs_on_device(3, 2, 6), tensors([normal(3, 4, 6)])
    function = partial(ops.neighbourhood_attention, num_heads=2)
    clean = with_gradients(function, inputs, grad)
    grad[1] = torch.nan
    for actual, before in zip(with_gradients(function, inputs, grad)[1:4], clean[1:4], strict=True):
        assert actual[1].isnan().all()
        assert torch.equal(actual[[0, 2]], before[[0, 2]])
