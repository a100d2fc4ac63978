"""Convolutions with bias, residual and ReLU in one call of cuDNN, for which PyTorch stands in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from squid_fast import Scorer
from squid_fast.inference import convolution
from squid_fast.inference.convolution import (
    CudnnConv,
    FoldedConv,
    OneDnnConv,
    cast,
    has_cudnn,
    use_cudnn,
)
from squid_fast.inference.model import FrozenModel
from squid_fast.inference.network import FrozenGenerator
from tests.factories import scorer_of, tiny_bundle, trained_discriminator, trained_squid
from tests.processor import needs_bf16

LAST = torch.channels_last
SHAPES = [  # channels in and out, side, kernel, stride
    (8, 16, 9, 3, 1), (16, 16, 8, 3, 1), (16, 32, 8, 3, 2), (3, 5, 7, 3, 2), (24, 8, 4, 1, 1),
]  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What cuDNN is asked beside tensors: alpha, stride, padding, dilation, groups."""
    seen: list[tuple[Any, ...]] = []

    def add_relu(
        x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *where: Any
    ) -> Tensor:
        assert x.dtype == weight.dtype == z.dtype == bias.dtype
        assert weight.is_contiguous(memory_format=LAST)
        seen.append((alpha, *where))
        wide = (x.float(), weight.float(), bias.float())
        return (F.conv2d(*wide, *where) + alpha * z.float()).relu().to(x.dtype)

    def relu(x: Tensor, weight: Tensor, bias: Tensor, *where: Any) -> Tensor:
        assert x.dtype == weight.dtype == bias.dtype
        seen.append((None, *where))
        wide = (x.float(), weight.float(), bias.float())
        return F.conv2d(*wide, *where).relu().to(x.dtype)

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    return seen


def fused_and_plain(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[CudnnConv, FoldedConv, Tensor, Tensor]:
    """A convolution both ways, maps, and a residual."""
    wide, out, side, kernel, stride = shape
    torch.manual_seed(0)
    weight = torch.randn(out, wide, kernel, kernel) / (wide * kernel**2) ** 0.5
    padding = [kernel // 2] * 2
    exact = FoldedConv(weight, torch.randn(out), [stride] * 2, padding)
    plain = cast(exact, dtype, LAST, onednn=False).to(device)
    fused = CudnnConv(plain.weight, plain.bias, plain.stride, plain.padding)
    x = torch.randn(3, wide, side, side, device=device).to(dtype, memory_format=LAST)
    residual = torch.randn(plain(x).shape, device=device).to(dtype, memory_format=LAST)
    return fused, plain, x, residual


def in_float64(conv: FoldedConv, x: Tensor, residual: Tensor | None) -> Tensor:
    wide = (x.double(), conv.weight.double(), conv.bias.double())
    found = F.conv2d(*wide, conv.stride, conv.padding)
    return (found if residual is None else found + residual.double()).relu()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_call_is_the_convolution(
    calls: list[tuple[Any, ...]], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    fused, plain, x, residual = fused_and_plain(shape, dtype)
    kept = residual.clone()
    unit = torch.finfo(dtype).eps / 2
    for z in (None, residual):
        found, expected = fused(x, z), in_float64(plain, x, z)
        # Rounded once, as all is summed in float32.
        torch.testing.assert_close(found.double(), expected, rtol=1.01 * unit, atol=1e-5)
        torch.testing.assert_close(found, plain(x, z), rtol=8 * unit, atol=8 * unit)
    assert torch.equal(residual, kept)
    where = (plain.stride, plain.padding, [1, 1], 1)
    assert calls == [(None, *where), (1.0, *where)]


def test_a_compiler_knows_the_shape_without_calling_it(calls: list[tuple[Any, ...]]) -> None:
    fused, _, x, residual = fused_and_plain(SHAPES[0], torch.bfloat16)
    for z in (None, residual):
        arguments = (x, fused.weight, fused.bias, z, fused.stride, fused.padding)
        torch.library.opcheck(
            convolution._cudnn_convolution,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )
    before = len(calls)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), fused(x))
    assert len(calls) == before + 2


# --- where it is used -----------------------------------------------------------------------------


def kinds(network: torch.nn.Module) -> set[type]:
    return {type(module) for module in network.modules() if isinstance(module, FoldedConv)}


def test_half_precision_in_channels_last_is_what_it_serves(calls: list[tuple[Any, ...]]) -> None:
    model = trained_squid()
    generator = FrozenGenerator(model, torch.bfloat16, LAST)
    images = torch.rand(2, 1, model.image_size, model.image_size)
    expected = generator(images)
    use_cudnn(generator)
    for name, conv in generator.named_modules():
        if isinstance(conv, FoldedConv):
            # The first reads images, and those around the memories are in float32.
            plain = name == "in_conv.first" or name.startswith("inpaint")
            assert type(conv) is (FoldedConv if plain else CudnnConv), name
    found = generator(images)
    assert calls
    assert (found - expected).square().mean().sqrt() < 0.2 * expected.std()
    for dtype, layout in ((torch.float32, LAST), (torch.bfloat16, torch.contiguous_format)):
        other = FrozenGenerator(model, dtype, layout)
        use_cudnn(other)
        assert kinds(other) == {FoldedConv}


def test_only_nvidias_cards_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_cudnn(gpu)
    assert not has_cudnn(cpu)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has_cudnn(gpu)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert not has_cudnn(gpu)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=needs_bf16)])
def test_a_cpu_never_gets_it(precision: str, calls: list[tuple[Any, ...]]) -> None:
    scorer = scorer_of(tiny_bundle(), precision=precision)
    scorer.score(torch.rand(2, 1, 48, 48))
    assert CudnnConv not in kinds(scorer.model)
    assert not calls


def test_what_is_exported_is_plain() -> None:
    model = trained_squid()
    frozen = FrozenModel(model, trained_discriminator(torch.rand(4, 1, 64, 64)))
    for module in list(frozen.generator.modules()):
        for name, conv in list(module.named_children()):
            if isinstance(conv, (FoldedConv, OneDnnConv)):
                fused = CudnnConv(conv.weight, conv.bias, conv.stride, conv.padding)
                setattr(module, name, fused)
    assert kinds(frozen) == {CudnnConv}
    assert kinds(frozen.portable()) == {FoldedConv}


# --- on a GPU -------------------------------------------------------------------------------------

HAS_CUDNN = torch.cuda.is_available() and has_cudnn(torch.device("cuda"))
cuda = pytest.mark.skipif(not HAS_CUDNN, reason="there is no card with cuDNN")


@cuda
@pytest.mark.parametrize(
    "shape",
    # Those of the published network at a batch of 3, first of their kind.
    [(32, 32, 64, 3, 1), (32, 64, 64, 3, 2), (256, 512, 8, 3, 2), (96, 32, 128, 3, 1), *SHAPES],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_in_the_output_beforehand_does_not_matter(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    fused, plain, x, residual = fused_and_plain(shape, dtype, "cuda")
    unit = torch.finfo(dtype).eps / 2
    for z in (None, residual):
        expected = in_float64(plain, x, z)
        before = torch.full_like(expected, torch.nan, dtype=dtype)
        address = before.data_ptr()
        del before  # which the result is given next
        found = fused(x, z)
        assert found.data_ptr() == address
        torch.testing.assert_close(found.double(), expected, rtol=1.01 * unit, atol=1e-4)


@cuda
def test_a_gpu_scores_in_bf16_with_it() -> None:
    pair = trained_squid(), trained_discriminator(torch.rand(4, 1, 64, 64))
    fused, exact = (Scorer(*pair, precision=name, device="cuda") for name in ("bf16", "float32"))
    assert CudnnConv in kinds(fused.model)
    assert kinds(exact.model) == {FoldedConv}
