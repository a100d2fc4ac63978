"""The discriminator's kernels against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from squid_fast import ops
from squid_fast.inference.discriminator import FrozenDiscriminator
from squid_fast.kernels import card
from squid_fast.kernels.card import A100, H100, MI300X, Card
from tests.factories import trained_discriminator
from tests.kernels.devices import DEVICE, DTYPES
from tests.ops.samples import (
    cast_parameters,
    discriminator_parameters,
    normal,
    plain_discriminator_score,
)
from tests.tolerances import assert_close

norms = pytest.mark.parametrize("norm", [True, False], ids=["norm", "bias"])
SMALL_CARD = Card("sm_90", multiprocessors=2, shared_memory=H100.shared_memory)


def on_device(parameters: dict[str, Any]) -> dict[str, Any]:
    return cast_parameters(parameters, lambda x: x.to(DEVICE, torch.float32))


def assert_right(images: Tensor, parameters: dict[str, Any]) -> Tensor:
    """Scores by the kernels, which must be those of the formula in float64."""
    parameters = on_device(parameters)
    scores = ops.discriminator_score(images, **parameters)
    assert scores.dtype == torch.float32
    wide = cast_parameters(parameters, lambda x: x.cpu().double())
    # A score is a sum of terms that may cancel.
    size = float(wide["regressor"].norm())
    assert_close(scores.cpu(), plain_discriminator_score(images.cpu().double(), **wide), floor=size)
    return scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@norms
@pytest.mark.parametrize(
    ("widths", "height", "width"),
    [
        ((1, 1), 5, 5),
        ((2, 3), 1, 9),
        ((3, 5, 2), 19, 31),
        ((7, 17), 8, 6),
        ((16, 33), 12, 10),
        ((4, 8, 16, 128), 30, 17),
    ],
    ids=str,
)
def test_equals_the_formula(
    widths: tuple[int, ...], height: int, width: int, norm: bool, dtype: torch.dtype
) -> None:
    images = normal(3, 1, height, width).to(DEVICE, dtype)
    assert_right(images, discriminator_parameters(widths, height, width, norm))


@pytest.mark.parametrize("on", [A100, H100, MI300X, SMALL_CARD], ids=["a100", "h100", "amd", "2"])
@norms
def test_tiles_of_every_card(on: Card, norm: bool) -> None:
    # Five images are more than the smallest has multiprocessors, so that programs take several;
    # a map of 25 x 23 places is more than one block on AMD's.
    with card.assume(on):
        for B, side in ((5, 24), (1, 97)):
            images = normal(B, 1, side, side - 5).to(DEVICE, torch.float32)
            assert_right(images, discriminator_parameters((2, 3, 5), side, side - 5, norm))


@norms
def test_more_images_than_multiprocessors(norm: bool) -> None:
    images = normal(400, 1, 9, 11).to(DEVICE, torch.float32)
    assert_right(images, discriminator_parameters((2, 3, 4), 9, 11, norm))


@norms
@pytest.mark.parametrize(("widths", "side"), [((1, 2, 1), 139), ((2, 90), 89)], ids=str)
def test_maps_of_many_blocks(widths: tuple[int, ...], side: int, norm: bool) -> None:
    # 35 x 33 places, and 23 x 21 of the last layer, where many channels leave room for 128.
    images = 3 + normal(1, 1, side, side - 8).to(DEVICE, torch.float32)
    assert_right(images, discriminator_parameters(widths, side, side - 8, norm))


@pytest.mark.parametrize("mode", ["instance", "running"])
@pytest.mark.parametrize(("height", "width"), [(48, 48), (39, 47), (128, 128)])
def test_the_published_discriminator(height: int, width: int, mode: str) -> None:
    side = -(-max(height, width) // 32) * 32
    discriminator = trained_discriminator(torch.rand(4, 1, side, side))
    with torch.no_grad():
        for name, value in discriminator.named_parameters():
            if name.startswith("conv_model") and value.dim() == 1:
                value.add_(0.3 * torch.randn_like(value))
    images = torch.rand(1 if side > 64 else 3, 1, height, width)
    with torch.no_grad():
        exact = copy.deepcopy(discriminator).double().score(images.double(), mode)
        frozen = FrozenDiscriminator(discriminator, mode, fused=True).to(DEVICE)
        found = frozen(images.to(DEVICE)).cpu()
    size = float(discriminator.regressor.weight.detach().norm())
    # PyTorch in float32 is off by up to 9e-6 on some processors.
    assert_close(found, exact, 5e-6, floor=size)


def test_one_pixel_of_map_without_norms() -> None:
    assert_right(
        normal(3, 1, 4, 3).to(DEVICE, torch.float32),
        discriminator_parameters((2, 3), 4, 3, norm=False),
    )


# --- edges ----------------------------------------------------------------------------------------


@norms
def test_images_of_any_strides(norm: bool) -> None:
    parameters = discriminator_parameters((2, 3), 9, 11, norm)
    base = normal(4, 3, 18, 33).to(DEVICE, torch.float32)
    assert_right(base[::2, 1:2, ::2, ::3], parameters)
    assert_right(base[:, :1, :11, :9].mT, parameters)
    assert_right(base[:1, :1, :9, :11].expand(3, 1, 9, 11), parameters)
    last = base[:, :1, :9, :11].contiguous(memory_format=torch.channels_last)
    assert_right(last, parameters)


@norms
def test_parameters_of_any_strides(norm: bool) -> None:
    parameters = on_device(discriminator_parameters((2, 3), 9, 11, norm))
    for name in ("biases", "scales"):
        parameters[name] = [x[:1].expand(len(x)) for x in parameters[name]]
    assert_right(normal(3, 1, 9, 11).to(DEVICE, torch.float32), parameters)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@norms
def test_nan_stays_in_its_image(norm: bool, bad: float) -> None:
    parameters = on_device(discriminator_parameters((2, 3, 4), 9, 11, norm))
    images = normal(5, 1, 9, 11).to(DEVICE, torch.float32)
    with card.assume(SMALL_CARD):  # whose programs take several images
        clean = ops.discriminator_score(images, **parameters)
        images[2, 0, 4, 5] = bad
        scores = ops.discriminator_score(images, **parameters)
    assert scores[2].isnan()
    scores[2] = clean[2]
    assert torch.equal(scores, clean)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_weights_of_any_size(size: float) -> None:
    parameters = discriminator_parameters((2, 3, 4), 9, 11, norm=True)
    for weight in parameters["weights"][1:]:
        weight *= size
        weight[0] = 0.0  # a channel that has none
    parameters["eps"] *= size**2
    assert_right(normal(2, 1, 9, 11).to(DEVICE, torch.float32), parameters)


def test_a_map_beyond_half_precision_is_nan_and_not_wrong() -> None:
    parameters = on_device(discriminator_parameters((2, 3), 9, 11, norm=False))
    images = normal(2, 1, 9, 11).to(DEVICE, torch.float32)
    images[0] *= 1e6
    scores = ops.discriminator_score(images, **parameters)
    assert scores.isnan().tolist() == [True, False]


@norms
def test_a_constant_image_has_no_spread(norm: bool) -> None:
    images = torch.full((2, 1, 9, 11), 0.5, device=DEVICE)
    assert_right(images, discriminator_parameters((1, 2), 9, 11, norm))


@norms
def test_packing_ahead_changes_nothing(norm: bool) -> None:
    parameters = on_device(discriminator_parameters((2, 3, 4), 9, 11, norm))
    images = normal(3, 1, 9, 11).to(DEVICE, torch.float32)
    packed = ops.pack_discriminator(parameters["weights"], parameters["regressor"])
    ahead = ops.discriminator_score(images, **parameters, packed=packed)
    assert torch.equal(ahead, ops.discriminator_score(images, **parameters))


def test_same_bits_every_time() -> None:
    parameters = on_device(discriminator_parameters((16, 32, 64), 33, 31, norm=True))
    images = normal(2, 1, 33, 31).to(DEVICE, torch.float32)
    first, second = (ops.discriminator_score(images, **parameters) for _ in range(2))
    assert torch.equal(first, second)
