"""The neighbourhood attention: values, gradients, edges; against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squid_fast import ops
from tests.ops.samples import DTYPES, attention_inputs, compare_attention, normal, up_to
from tests.tolerances import assert_close


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "P", "C", "heads"),
    [(1, 1, 1, 1), (2, 1, 8, 8), (3, 2, 6, 3), (1, 3, 7, 7)]
    + [(2, 3, 16, 8), (5, 4, 5, 1), (1, 5, 34, 2), (0, 2, 4, 2)],
)
def test_attention_equals_reference(B: int, P: int, C: int, heads: int, dtype: torch.dtype) -> None:
    compare_attention([x.to(dtype) for x in attention_inputs(B, P, C)], heads)


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(0, 3),
    P=up_to(4),
    heads=up_to(4),
    width=up_to(5),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_attention_at_drawn_sizes(B: int, P: int, heads: int, width: int, scale: float) -> None:
    compare_attention(attention_inputs(B, P, heads * width, scale), heads)


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
    compare_attention([query[:1].expand(B, -1, -1), key, value, *pads], 4)


def test_attention_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in attention_inputs(2, 2, 4)]
    assert torch.autograd.gradcheck(lambda *x: ops.neighbourhood_attention(*x, 2), inputs)
