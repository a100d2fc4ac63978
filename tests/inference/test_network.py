"""The frozen network against the model it is made of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squid_fast
from squid_fast.inference.convolution import (
    FoldedConv,
    ResizedConv,
    SplitConv,
    cast,
    fold,
    fold_discriminator,
)
from squid_fast.inference.network import FrozenGenerator
from squid_fast.inference.windows import WindowMemory
from tests.factories import decoder_memory, trained_squid
from tests.processor import needs_bf16, needs_onednn

CONFIGS: dict[str, dict[str, Any]] = {
    "published shape": {"decoder_memory": decoder_memory("MemoryMatrixBlock", 64, 4)},
    "patches to the end": {"initial_combine": None, "ops": ["concat", "concat"]},
    "whole from the start": {"initial_combine": 2, "ops": ["none", "concat"]},
    "nine patches": {
        "num_patch": 3,
        "decoder_memory": decoder_memory("MemoryMatrixBlockV3", 256, 9),
    },
    "hard shrinkage": {"shrink_thres": 0.001, "ops": ["none", "none"]},
    "two channels": {"num_in_ch": 2},
}


def images_for(model: squid_fast.SQUID, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, model.num_in_ch, model.image_size, model.image_size, generator=generator)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_onednn)])
def test_float32_is_the_model(name: str, layout: torch.memory_format, onednn: bool) -> None:
    model = trained_squid(**CONFIGS[name])
    images = images_for(model)
    frozen = FrozenGenerator(model, torch.float32, layout, onednn)
    with torch.inference_mode():
        expected, found = model(images)["recon"], frozen(images)
    assert expected.std() > 0.05  # else anything would do
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=[needs_onednn, needs_bf16])])
def test_bf16_stays_close_to_the_model(onednn: bool) -> None:
    model = trained_squid(**CONFIGS["published shape"])
    images = images_for(model, 8)
    frozen = FrozenGenerator(model, torch.bfloat16, torch.channels_last, onednn)
    with torch.inference_mode():
        expected, found = model(images)["recon"], frozen(images)
    error = (found - expected).square().mean().sqrt()
    assert 0 < error < 0.2 * expected.std()


@pytest.mark.parametrize("kind", ["published shape", "nine patches", "whole map"])
def test_memories_of_maps_in_bf16_are_those_of_maps_in_float32(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"decoder_memory": decoder_memory("MemoryMatrixBlockV4", 256, 4)}
    model = trained_squid(**CONFIGS.get(kind, whole))
    images = images_for(model)
    frozen = FrozenGenerator(model, torch.bfloat16, torch.channels_last)
    assert [isinstance(w, WindowMemory) for w in frozen.windows] == [False, True]
    assert not any("windows" in name for name in frozen.state_dict())
    with torch.inference_mode():
        exact, expected = model(images)["recon"], frozen(images)
        # As on a GPU, but by PyTorch, which adds up the parts of the slots again.
        monkeypatch.setattr(WindowMemory, "serves", lambda self, x: x.dtype == torch.bfloat16)
        monkeypatch.setattr(frozen, "memories", nn.ModuleList([nn.Identity(), nn.Flatten()]))
        found = frozen(images)
    # The others' slots are turned, so that their products are added up in another order.
    rounding = (expected - exact).square().mean().sqrt()
    bound = 0 if kind == "published shape" else rounding / 10
    assert (found - expected).square().mean().sqrt() <= bound


def test_only_gumbel_shrinkage_has_windows() -> None:
    for thres, fits in ((3, True), (0, False), (0.5, False)):
        memory = decoder_memory("MemoryMatrixBlock", 64, 4)
        model = trained_squid(shrink_thres=thres, decoder_memory=memory)
        assert [*map(WindowMemory.fits, model.memory_blocks)] == [False, fits]
        frozen = FrozenGenerator(model, torch.bfloat16, torch.channels_last)
        assert isinstance(frozen.windows[1], WindowMemory) == fits
        assert not isinstance(FrozenGenerator(model).windows[1], WindowMemory)


def test_what_is_frozen_does_not_change_with_the_model_nor_the_model_with_it() -> None:
    model = trained_squid()
    before = copy.deepcopy(model.state_dict())
    images = images_for(model)
    model.train()
    frozen = FrozenGenerator(model)
    with torch.inference_mode():
        first = frozen(images)
    assert model.training
    assert model.inpaint_block.projected is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with torch.inference_mode():
        assert torch.equal(frozen(images), first)


def test_the_teacher_is_left_out() -> None:
    model = trained_squid()
    size = sum(parameter.numel() for parameter in model.parameters())
    teacher = sum(p.numel() for n, p in model.named_parameters() if n.startswith("teacher"))
    frozen = FrozenGenerator(model)
    kept = sum(value.numel() for name, value in frozen.state_dict().items() if "memory" not in name)
    assert teacher > 0
    assert kept < size - teacher


def test_folding_is_the_norm_behind_the_convolution() -> None:
    torch.manual_seed(2)
    conv, norm = nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight)
    x, residual = torch.rand(2, 3, 9, 9), torch.randn(2, 5, 5, 5)
    folded = fold(conv.eval(), norm.eval())
    expected = norm(conv(x))
    torch.testing.assert_close(folded(x), expected.relu(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        folded(x, residual.clone()), (expected + residual).relu(), rtol=1e-5, atol=1e-6
    )


@needs_onednn
@needs_bf16
def test_images_in_two_numbers_lose_less_than_in_one() -> None:
    torch.manual_seed(3)
    conv = FoldedConv(torch.randn(16, 1, 3, 3) / 3, torch.rand(16), [1, 1], [1, 1])
    images = torch.rand(4, 1, 32, 32)
    exact = conv(images)

    def error(found: Tensor) -> float:
        # The result itself is rounded to bfloat16 either way: compare with the rounded one.
        return float((found.float() - exact.bfloat16().float()).square().mean().sqrt())

    split = SplitConv(conv, torch.channels_last)
    plain = cast(conv, torch.bfloat16, torch.channels_last, onednn=True)
    assert error(split(images)) < error(plain(images.bfloat16())) / 5
    weight = conv.weight.double()
    as_double = F.conv2d(images.double(), weight, conv.bias.double(), padding=1).relu()
    torch.testing.assert_close(split(images).double(), as_double, rtol=2**-8, atol=1e-4)


@needs_onednn
@needs_bf16
@pytest.mark.parametrize("side", [1, 2, 3, 8])
@pytest.mark.parametrize("skip", [0, 16])
def test_a_convolution_before_the_resize_is_the_convolution_behind_it(side: int, skip: int) -> None:
    torch.manual_seed(4)
    weight, bias = torch.randn(32, 48 + skip, 3, 3) / 20, torch.randn(32)
    conv = FoldedConv(weight, bias, [1, 1], [1, 1])
    x = torch.randn(3, 48, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
    ahead = torch.randn(3, skip, 2 * side, 2 * side).bfloat16()
    ahead = ahead.contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(x.double(), scale_factor=2, mode="bilinear", align_corners=False)
    both = torch.cat([ahead.double(), resized], dim=1)
    expected = F.conv2d(both, weight.double(), bias.double(), padding=1).relu()
    plain = cast(conv, torch.bfloat16, torch.channels_last, onednn=True)(both.bfloat16())
    found = ResizedConv(conv, skip, side, torch.channels_last)(x, ahead if skip else None)
    assert found.is_contiguous(memory_format=torch.channels_last)

    def error(y: Tensor) -> float:
        return float((y.double() - expected).square().mean().sqrt())

    assert error(found) < 2 * error(plain)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.05)


def test_running_statistics_become_part_of_the_discriminator() -> None:
    torch.manual_seed(5)
    discriminator = squid_fast.Discriminator(2)
    images = torch.rand(6, 1, 48, 48)
    with torch.no_grad():
        for _ in range(3):
            discriminator(images)
        discriminator.eval()
        folded = fold_discriminator(discriminator)
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
        expected = discriminator.score(images, "running")
        torch.testing.assert_close(folded.score(images, "running"), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(expected, discriminator.score(images, "instance"), atol=1e-3)
