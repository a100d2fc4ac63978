"""The kernel of reconstructions and errors against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops
from tests.kernels.devices import DEVICE, DTYPES, drawn
from tests.ops.samples import normal, up_to
from tests.ops.scoring import SIZES, grey, head_weights, plain_reconstruction, sliced
from tests.tolerances import TOLERANCES, assert_close


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def strided(x: Tensor) -> Tensor:
    """Every second row, third column and second channel of something larger."""
    B, F, H, W = x.shape
    return x.new_full((B, 2 * F, 2 * H, 3 * W), torch.nan)[:, ::2, ::2, ::3].copy_(x)


LAYOUTS = [contiguous, channels_last, strided]


def call(
    x: Tensor, images: Tensor, P: int, whole: bool, layout: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Of the maps of whole images, which are given as such or as those of patches."""
    given_x = layout(x if whole else sliced(x, P).flatten(0, 1))
    weight, bias = head_weights(x.shape[1])
    arguments = [z.to(DEVICE) for z in (given_x, weight, bias, images)]
    recon, errors = ops.reconstruct(*arguments, P)
    return recon.cpu(), errors.cpu()


def assert_right(
    x: Tensor,
    images: Tensor,
    P: int,
    whole: bool = False,
    layout: Callable[[Tensor], Tensor] = channels_last,
) -> None:
    found = call(x, images, P, whole, layout)
    expected = plain_reconstruction(x, *head_weights(x.shape[1]), images, P)
    for got, value in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        # The maps are as given: nothing is rounded to their dtype.
        assert_close(got, value, TOLERANCES[torch.float32])


@pytest.mark.parametrize("whole", [False, True], ids=["patches", "whole"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given_as", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_formula(
    size: tuple[int, int, int], given_as: torch.dtype, dtype: torch.dtype, whole: bool
) -> None:
    P, H, W = size
    assert_right(normal(2, 32, H, W).to(dtype), grey(2, H, W, given_as), P, whole)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("F", [1, 4, 16, 33, 130])
def test_any_number_of_channels(F: int, layout: Callable[[Tensor], Tensor]) -> None:
    assert_right(normal(2, F, 10, 10).float(), grey(2, 10, 10), 2, F == 16, layout)


@drawn
@given(
    B=up_to(3),
    P=up_to(4),
    h=up_to(9),
    w=up_to(9),
    F=up_to(40),
    whole=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_drawn_sizes(
    B: int, P: int, h: int, w: int, F: int, whole: bool, layout: Callable[[Tensor], Tensor]
) -> None:
    assert_right(normal(B, F, P * h, P * w).float(), grey(B, P * h, P * w), P, whole, layout)


def test_weights_of_any_stride() -> None:
    x, images = normal(2, 5, 6, 6).float().to(DEVICE), grey(2, 6, 6).to(DEVICE)
    weight, bias = (z.to(DEVICE) for z in head_weights(5))
    apart = torch.stack([weight, weight + 1], dim=2)[:, :, 0]
    assert all(map(torch.equal, *(ops.reconstruct(x, w, bias, images, 2) for w in (weight, apart))))


def test_images_of_any_strides() -> None:
    larger = grey(4, 12, 24)
    for images in (larger[1::2, :, ::2, ::3], larger.mT, larger[:1].expand(4, 1, 12, 24)):
        B, _, H, W = images.shape
        assert_right(normal(B, 5, H, W).float(), images, 2)


def test_a_saturated_sigmoid() -> None:
    logits = torch.tensor([-1000.0, -100.0, 100.0, 1000.0], device=DEVICE).view(1, 1, 2, 2)
    one, zero = torch.ones(1, 1, 1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    recon, errors = ops.reconstruct(logits, one, zero, torch.zeros_like(logits), 1)
    assert_close(recon, torch.tensor([0.0, 0.0, 1.0, 1.0], device=DEVICE).view(1, 1, 2, 2))
    assert_close(errors, torch.tensor([[0.5]], device=DEVICE))


@pytest.mark.parametrize("where", ["map", "image"])
def test_nan_stays_in_its_pixel_and_patch(where: str) -> None:
    x, images = normal(2, 5, 12, 12).float(), grey(2, 12, 12)
    clean = call(x, images, 2, False, channels_last)
    if where == "map":
        x[1, 3, 6, 5] = torch.nan
    else:
        images[1, 0, 6, 5] = torch.nan
    recon, errors = call(x, images, 2, False, channels_last)
    assert errors[1, 2].isnan()
    assert recon[1, 0, 6, 5].isnan() == (where == "map")
    recon[1, 0, 6, 5], errors[1, 2] = clean[0][1, 0, 6, 5], clean[1][1, 2]
    assert torch.equal(recon, clean[0])
    assert torch.equal(errors, clean[1])


def test_same_bits_every_time_and_beside_any_other_image() -> None:
    x, images = normal(3, 8, 96, 96).half(), grey(3, 96, 96, torch.uint8)
    first, second = (call(x, images, 2, False, channels_last) for _ in range(2))
    assert all(map(torch.equal, first, second))
    alone = call(x[1:2], images[1:2], 2, False, channels_last)
    assert torch.equal(alone[0], first[0][1:2])
    assert torch.equal(alone[1], first[1][1:2])
