"""The one setting of TF32, with the interface of every version of PyTorch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.scoring import speed
from squid_fast import PRESETS, SQUID, Discriminator
from squid_fast.experiments.baselines import BaselineScorer
from squid_fast.experiments.baselines.networks import AutoEncoder
from squid_fast.experiments.published import published_way
from squid_fast.experiments.research_scores import other_scores
from squid_fast.inference.model import FrozenModel
from squid_fast.modules import InpaintBlock
from squid_fast.presets import Recipe
from squid_fast.training import train
from squid_fast.utils.tf32 import tf32
from tests.factories import image_batch, image_set, tiny_bundle


def stand_ins(
    monkeypatch: pytest.MonkeyPatch, by_operation: bool, products: Any
) -> tuple[Any, ...]:
    """Settings of convolutions, which PyTorch has on by default, and of products."""
    if by_operation:  # from PyTorch 2.9 on
        convolutions = SimpleNamespace(fp32_precision="tf32")
        cudnn, matmul = SimpleNamespace(conv=convolutions), SimpleNamespace(fp32_precision=products)
    else:
        cudnn = convolutions = SimpleNamespace(allow_tf32=True)
        matmul = SimpleNamespace(allow_tf32=products)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    return convolutions, matmul


def settings(places: tuple[Any, ...]) -> list[Any]:
    return [next(iter(vars(place).values())) for place in places]


@pytest.mark.parametrize(
    ("by_operation", "products", "off", "on"),
    [
        (True, "none", ["ieee", "none"], ["tf32", "tf32"]),
        (True, "tf32", ["ieee", "ieee"], ["tf32", "tf32"]),
        (False, False, [False, False], [True, True]),
        (False, True, [False, False], [True, True]),
    ],
)
def test_float32_inside_and_as_before_behind(
    monkeypatch: pytest.MonkeyPatch, by_operation: bool, products: Any, off: Any, on: Any
) -> None:
    places = stand_ins(monkeypatch, by_operation, products)
    before = settings(places)
    with tf32(False):
        assert settings(places) == off
        with tf32(True, products=True):
            assert settings(places) == on
        assert settings(places) == off
    assert settings(places) == before
    with pytest.raises(ZeroDivisionError), tf32(False):
        1 / 0  # noqa: B018
    assert settings(places) == before


def in_tf32() -> bool:
    """Whether a float32 convolution may be in TF32, as this version of PyTorch says it."""
    if hasattr(torch.backends.cudnn, "conv"):
        return torch.backends.cudnn.conv.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def test_pytorchs_own_settings() -> None:
    before = in_tf32(), torch.backends.cuda.matmul.allow_tf32
    with tf32(False):
        assert (in_tf32(), torch.backends.cuda.matmul.allow_tf32) == (False, False)
        with tf32(True):
            assert in_tf32()
        assert not in_tf32()
    # The former flags can still be read: they were not left in contradiction.
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# --- where it holds -------------------------------------------------------------------------------


def test_the_projection_of_slots_on_their_way_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found, freeze = [], InpaintBlock.freeze

    def noting(block: InpaintBlock) -> None:
        products = torch.backends.cuda.matmul
        found.append(getattr(products, "fp32_precision", None) or products.allow_tf32)
        freeze(block)

    monkeypatch.setattr(InpaintBlock, "freeze", noting)
    with tf32(True, products=True):
        InpaintBlock(16, num_slots=5, num_memory=4, memory_channel=16).freeze()
        FrozenModel(SQUID.from_preset("small"), Discriminator(2))
    of_the_caller, *found = found
    assert of_the_caller in ("tf32", True)
    assert found
    assert of_the_caller not in found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether convolutions, forward and backward, might be in TF32 when they were called."""
    found: list[bool] = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            found.append(in_tf32())
            return grad

    convolve = F.conv2d

    def noting(*arguments: Any, **options: Any) -> Tensor:
        found.append(in_tf32())
        return Noting.apply(convolve(*arguments, **options))

    monkeypatch.setattr(F, "conv2d", noting)
    return found


def test_the_published_way(seen: list[bool]) -> None:
    bundle, images = tiny_bundle(), image_batch(2)
    seen.clear()
    for wanted in (False, True):
        published_way(bundle, torch.device("cpu"), in_tf32=wanted)(images)
        assert len(seen) > 20
        assert set(seen) == {wanted}
        seen.clear()


def test_training(seen: list[bool], tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    recipe = Recipe(batch_size=4, epochs=1, t_max=1, validate_every=1)
    images, model = image_set(4), SQUID.from_preset("small")
    train(model, images, tmp_path, recipe, device="cpu", precision="float32")
    assert len(seen) > 20
    assert not any(seen)


def test_both_ways_of_training_that_are_timed(seen: list[bool]) -> None:
    for _, step in speed.training(PRESETS["small"], torch.device("cpu"), 2).values():
        step()
    assert len(seen) > 20
    assert not any(seen)


def test_a_baseline(seen: list[bool]) -> None:
    method = AutoEncoder(width=8)
    BaselineScorer("autoencoder", method, 32, device="cpu").measure(image_batch(2, 32), ())
    assert seen
    assert not any(seen)


def test_scores_for_research(seen: list[bool]) -> None:
    other_scores(SQUID.from_preset("small"), image_set(2), "float32", "cpu")
    assert len(seen) > 20
    assert not any(seen)
