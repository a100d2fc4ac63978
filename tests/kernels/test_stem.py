"""The stem's kernel against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops
from tests.kernels.devices import DEVICE, DTYPES, drawn
from tests.ops.samples import up_to
from tests.ops.scoring import SIZES, grey, plain_stem, sliced, stem_weights
from tests.tolerances import assert_close

IMAGES = [torch.uint8, torch.float32, torch.float16]


def assert_right(images: Tensor, F: int, P: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The maps, which are those of the formula in float64, channels-last."""
    weight, bias = stem_weights(F)
    found = ops.stem(images.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), P, dtype)
    assert found.dtype == dtype
    assert found.stride(1) == 1
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found.cpu(), plain_stem(images, weight, bias, P))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given_as", IMAGES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_formula(
    size: tuple[int, int, int], given_as: torch.dtype, dtype: torch.dtype
) -> None:
    P, H, W = size
    found = assert_right(grey(2, H, W, given_as), 32 if H < 90 else 4, P, dtype)
    assert (found == 0).any() or found.numel() < 1000  # the ReLU is seen
    assert (found > 0).any()


@pytest.mark.parametrize("F", [1, 4, 16, 33, 65])
def test_any_number_of_channels(F: int) -> None:
    assert_right(grey(2, 10, 10), F, 2)


@drawn
@given(
    B=up_to(3), P=up_to(4), h=up_to(9), w=up_to(9), F=up_to(40), given_as=st.sampled_from(IMAGES)
)
def test_drawn_sizes(B: int, P: int, h: int, w: int, F: int, given_as: torch.dtype) -> None:
    assert_right(grey(B, P * h, P * w, given_as), F, P)


def test_images_of_any_strides() -> None:
    larger = grey(4, 12, 24)
    for images in (larger[1::2, :, ::2, ::3], larger.mT, larger[:1].expand(4, 1, 12, 24)):
        assert_right(images, 5, 2)


def test_weights_of_any_strides() -> None:
    images, (weight, bias) = grey(1, 6, 6).to(DEVICE), (x.to(DEVICE) for x in stem_weights(8))
    beside = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    twice = torch.stack([bias, bias], dim=1)[:, 0]
    expected = ops.stem(images, weight, bias, 2)
    assert torch.equal(ops.stem(images, beside, twice, 2), expected)
    assert torch.equal(ops.stem(images, weight.mT.contiguous().mT, bias, 2), expected)


def test_every_patch_has_borders_of_its_own() -> None:
    ones = torch.ones(1, 1, 12, 9, device=DEVICE)
    weight, bias = torch.ones(2, 1, 3, 3, device=DEVICE), torch.zeros(2, device=DEVICE)
    rows, columns = torch.tensor([2, 3, 3, 2]), torch.tensor([2, 3, 2])
    expected = (rows[:, None] * columns).float().to(DEVICE)
    assert torch.equal(ops.stem(ones, weight, bias, 3), expected.expand(9, 2, 4, 3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_pixel_stays_among_its_neighbours(bad: float) -> None:
    images, (weight, bias) = grey(2, 12, 12), stem_weights(5)
    wrong = images.clone()
    wrong[1, 0, 6, 5] = bad  # the corner of a patch
    clean, found = (
        ops.stem(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), 2).cpu() for x in (images, wrong)
    )
    touched = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    touched[1, 0, 6:8, 4:6] = True
    touched = sliced(touched, 2).flatten(0, 1).expand(-1, 5, -1, -1)
    if bad != bad:
        assert found[touched].isnan().all()
    assert not torch.equal(found[touched], clean[touched])
    assert torch.equal(found[~touched], clean[~touched])


def test_same_bits_every_time_and_beside_any_other_image() -> None:
    images, (weight, bias) = grey(3, 48, 48, torch.uint8).to(DEVICE), stem_weights(8)
    arguments = weight.to(DEVICE), bias.to(DEVICE), 2, torch.float16
    first, second = (ops.stem(images, *arguments) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(ops.stem(images[1:2], *arguments), first[4:8])
