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
    has_onednn,
)
from squid_fast.inference.discriminator import FrozenDiscriminator
from squid_fast.inference.ends import Head, Stem
from squid_fast.inference.inpainting import PlaceConv, SplitLinear, SplitMemory, split_products
from squid_fast.inference.model import FrozenModel
from squid_fast.inference.network import FrozenGenerator
from squid_fast.inference.windows import WindowMemory
from squid_fast.modules import ScoreMode
from squid_fast.modules.unet import OutConv
from squid_fast.ops.images import patch_errors
from squid_fast.ops.patches import to_patches
from tests.factories import decoder_memory, tiny_squid, trained_discriminator, trained_squid
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


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_images(name: str, dtype: torch.dtype) -> None:
    model = trained_squid(**CONFIGS[name])
    frozen = FrozenGenerator(model, dtype, torch.channels_last)
    assert isinstance(frozen.in_conv.first, Stem) == (dtype == torch.bfloat16)
    pixels = (images_for(model) * 255).to(torch.uint8)
    with torch.inference_mode():
        found, errors = frozen.reconstruct(pixels)
        expected = frozen(pixels.float() / 255)
    assert torch.equal(found, expected)
    P = model.num_patch
    squares = to_patches((found - pixels.float() / 255).square(), P).mean(dim=(1, 2, 3))
    torch.testing.assert_close(errors, squares.view(-1, P * P))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_stem_is_the_convolution_of_patches(layout: torch.memory_format) -> None:
    model = trained_squid(**CONFIGS["nine patches"])
    images = images_for(model)
    with torch.inference_mode():
        conv = FrozenGenerator(model).in_conv.first
        expected = conv(to_patches(images, 3))
        found = FrozenGenerator(model, torch.bfloat16, layout).in_conv.first(images)
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["published shape", "nine patches"])
def test_codes_are_biases_of_their_places(name: str) -> None:
    model = trained_squid(**CONFIGS[name])
    block = model.inpaint_block
    N, bits = block.code.shape
    conv, norm, _ = block.bottleneck_conv2
    with torch.no_grad():
        conv.weight[:, -bits:] += 1  # so that places differ
    z = torch.randn(3 * N, conv.weight.shape[1] - bits, 4, 4)
    code = block.code.repeat(3, 1)[:, :, None, None].expand(-1, -1, 4, 4)
    folded = fold(conv, norm)
    expected = folded(torch.cat([z, code], dim=1))
    found = PlaceConv(folded, block.code)(z)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    turned = PlaceConv(folded, block.code.roll(1, 0))(z)
    assert not torch.allclose(turned, expected, atol=0.1)
    for onednn in {False, has_onednn()}:
        frozen = FrozenGenerator(model, onednn=onednn).inpaint
        assert isinstance(frozen.bottleneck_conv2, PlaceConv) == (not onednn)


@pytest.mark.parametrize("mixing", ["attention", "convolution"])
def test_split_linears_are_those_of_the_block(mixing: str) -> None:
    model = trained_squid(inpainting={"mixing": mixing})
    block = FrozenGenerator(model).inpaint
    f = torch.randn(3, block.num_memory, model.config["memory_channel"])
    with torch.inference_mode():
        expected = block.inpaint(f)
        split_products(block)
        found = block.inpaint(f)
    linears = sum(isinstance(module, SplitLinear) for module in block.modules())
    assert linears == (4 if mixing == "attention" else 2)
    assert not any(type(module) is nn.Linear for module in block.modules())
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("mixing", ["attention", "convolution"])
def test_a_split_memory_is_the_memory(mixing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_squid(inpainting={"mixing": mixing})
    block = FrozenGenerator(model).inpaint
    f = torch.randn(3, block.num_memory, model.config["memory_channel"])
    frozen = mixing == "attention"  # else there is nothing to freeze
    with torch.inference_mode():
        expected = block.inpaint(f)
        block.memory = split = SplitMemory(block.memory)
        assert block._is_frozen() == frozen
        assert torch.equal(block.inpaint(f), expected)
        # As on a GPU, but by PyTorch, which adds up the parts of the slots again.
        monkeypatch.setattr(SplitMemory, "serves", lambda self, maps: True)
        split.memory.look_up = None  # which nobody calls
        for own in (block, copy.deepcopy(block), copy.deepcopy(block).to(torch.float32)):
            assert own._is_frozen() == frozen
            assert torch.equal(own.inpaint(f), expected)


def test_memories_that_are_split() -> None:
    for changes, fits in (
        ({}, True),
        ({"shrink_thres": 0}, False),
        ({"shrink_thres": 0.5}, False),
        ({"inpainting": {"memory": "matrix"}}, True),
        ({"inpainting": {"memory": "shared"}}, False),
    ):
        block = FrozenGenerator(tiny_squid(**changes).eval()).inpaint
        before = block.memory
        assert SplitMemory.fits(before) == fits
        split_products(block)
        assert isinstance(block.memory, SplitMemory) == fits
        assert block.memory.slots is before.slots
    assert not SplitMemory.fits(nn.Identity())


@pytest.mark.parametrize(("device", "precision", "split"), [
    ("meta", "bf16", True), ("meta", "float32", False), ("cpu", "float32", False),
])  # fmt: skip
def test_products_are_split_where_bf16_is_scored_on_a_gpu(
    device: str, precision: Any, split: bool
) -> None:
    pair = trained_squid(), trained_discriminator(torch.rand(2, 1, 64, 64))
    block = FrozenModel(*pair, precision, device).generator.inpaint  # "meta" is no CPU
    assert isinstance(block.memory, SplitMemory) == split
    assert isinstance(block.query, SplitLinear) == split


@pytest.mark.parametrize("kind", ["published shape", "nine patches", "whole map"])
def test_memories_of_maps_in_bf16_are_those_of_maps_in_float32(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"decoder_memory": decoder_memory("MemoryMatrixBlockV4", 256, 4)}
    model = trained_squid(**CONFIGS.get(kind, whole))
    images = images_for(model)
    frozen = FrozenGenerator(model, torch.bfloat16, torch.channels_last)
    assert [isinstance(memory, WindowMemory) for memory in frozen.memories] == [False, True]
    assert not any(name.endswith("slots") for name in frozen.state_dict())
    with torch.inference_mode():
        exact, expected = model(images)["recon"], frozen(images)
        # As on a GPU, but by PyTorch, which adds up the parts of the slots again.
        monkeypatch.setattr(WindowMemory, "serves", lambda self, x: x.dtype == torch.bfloat16)
        frozen.memories[1].block = nn.Flatten()  # which nobody asks
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
        assert isinstance(frozen.memories[1], WindowMemory) == fits
        assert not isinstance(FrozenGenerator(model).memories[1], WindowMemory)


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


@pytest.mark.parametrize("mode", ["instance", "running"])
def test_a_frozen_discriminator_scores_as_the_discriminator(mode: ScoreMode) -> None:
    images = torch.rand(6, 1, 48, 41)
    discriminator = trained_discriminator(images)
    with torch.no_grad():
        expected = discriminator.score(images, mode)
        plain = FrozenDiscriminator(discriminator, mode, fused=False)
        fused = FrozenDiscriminator(discriminator, mode, fused=True)
        if mode == "instance":
            assert torch.equal(plain(images), expected)  # on CPUs, scores never change
        else:
            folded = fold_discriminator(discriminator)
            assert torch.equal(plain(images), folded.score(images, mode))
        torch.testing.assert_close(fused(images), expected, rtol=1e-5, atol=1e-5)
        several = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)  # as several GPUs train
        assert torch.equal(FrozenDiscriminator(several, mode, fused=True)(images), fused(images))
    # What is packed follows from the weights, and is not saved beside them.
    assert fused.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("whole", [True, False], ids=["image", "patches"])
def test_a_head_compares_what_a_convolution_has_made(dtype: torch.dtype, whole: bool) -> None:
    images = torch.randint(0, 256, (2, 1, 6, 9), dtype=torch.uint8)
    if dtype == torch.float32:
        images = images / 255
    recon, made = torch.rand(2, 1, 6, 9), Head(OutConv(4, 1), 3)
    found, errors = made.compare(recon if whole else to_patches(recon, 3), images)
    assert torch.equal(found, recon)
    torch.testing.assert_close(errors, patch_errors(recon, images, 3), rtol=1e-5, atol=1e-6)
