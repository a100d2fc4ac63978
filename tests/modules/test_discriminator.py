"""The discriminator and its two kinds of score."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from squid_fast import Discriminator, reference
from squid_fast.modules import discriminator_size
from tests.tolerances import TOLERANCES, assert_close

modes = pytest.mark.parametrize("mode", ["instance", "running"])
trainings = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def trained(size: int, dtype: torch.dtype = torch.float64) -> Discriminator:
    """A discriminator whose batch norms have statistics and affine parameters of their own."""
    discriminator = Discriminator(size)
    with torch.no_grad():
        for name, value in discriminator.named_parameters():
            if name.startswith("conv_model") and value.dim() == 1:
                value.add_(0.3 * torch.randn_like(value))
        for _ in range(3):
            discriminator.train()(torch.rand(4, 1, 32 * size, 32 * size))
    return discriminator.eval().to(dtype)


def noise(n: int, side: int = 64, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 1, side, side, dtype=dtype)


def twin(discriminator: Discriminator) -> reference.Discriminator:
    plain = reference.Discriminator(discriminator.size).to(discriminator.regressor.weight.dtype)
    plain.load_state_dict(discriminator.state_dict(), strict=True)
    return plain.eval()


@pytest.mark.parametrize(("size", "side"), [(1, 32), (1, 3), (2, 64), (2, 48), (3, 96), (4, 128)])
@trainings
def test_logits_equal_reference(size: int, side: int, training: bool) -> None:
    discriminator = trained(size)
    plain = twin(discriminator)
    images = noise(3, side)
    logits = discriminator.train(training)(images)
    assert logits.shape == (3, 1)
    assert_close(logits, plain.train(training)(images))
    state = discriminator.state_dict()
    for name, value in plain.state_dict().items():
        assert_close(state[name].double(), value.double())


@modes
@pytest.mark.parametrize(("size", "side"), [(2, 64), (2, 40), (3, 96)])
def test_score_equals_reference(size: int, side: int, mode: str) -> None:
    discriminator = trained(size)
    images = noise(3, side)
    expected = reference.discriminator_logits(twin(discriminator), images, mode)
    assert_close(discriminator.score(images, mode), expected)


def test_instance_score_is_what_training_mode_says_of_batches_of_one() -> None:
    discriminator = trained(2)
    images = noise(4)
    scores = discriminator.score(images)
    alone = twin(discriminator).train()
    assert_close(scores, torch.cat([alone(image)[:, 0] for image in images.split(1)]))


def test_running_score_is_what_evaluation_says() -> None:
    discriminator = trained(2)
    images = noise(4)
    expected = discriminator(images)[:, 0]
    assert_close(discriminator.score(images, "running"), expected)
    assert_close(discriminator.train().score(images, "running"), expected)
    difference = discriminator.score(images) - expected
    assert difference.abs().min() > 1e-3  # the two kinds differ


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@modes
def test_score_does_not_depend_on_the_batch(mode: str, dtype: torch.dtype) -> None:
    discriminator = trained(2, dtype)
    images = noise(7, dtype=dtype)
    whole = discriminator.score(images, mode)
    for sizes in ([1] * 7, [2, 5], [6, 1]):
        parts = [discriminator.score(x, mode) for x in images.split(sizes)]
        assert_close(torch.cat(parts), whole, 5 * TOLERANCES[dtype])


@trainings
@modes
def test_score_changes_nothing(mode: str, training: bool) -> None:
    discriminator = trained(2).train(training)
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    discriminator.score(noise(3), mode)
    assert all(torch.equal(v, before[k]) for k, v in discriminator.state_dict().items())
    assert discriminator.training is training
    assert all(m.training is training for m in discriminator.modules())


def test_score_is_differentiable_like_the_reference() -> None:
    discriminator = trained(2)
    images = noise(2).requires_grad_()
    (grad,) = torch.autograd.grad(discriminator.score(images).sum(), images)
    alone = twin(discriminator).train()
    total = torch.stack([alone(image).sum() for image in images.split(1)]).sum()
    (expected,) = torch.autograd.grad(total, images)
    assert_close(grad, expected)


def test_channels_last_gives_the_same_score() -> None:
    discriminator = trained(2)
    images = noise(3)
    expected = discriminator.score(images)
    last = discriminator.to(memory_format=torch.channels_last)
    assert_close(last.score(images.to(memory_format=torch.channels_last)), expected)


def test_size_is_a_thirty_second_of_the_side_rounded_up() -> None:
    sizes = map(discriminator_size, (1, 32, 33, 48, 64, 96, 128, 1000))
    assert list(sizes) == [1, 1, 2, 2, 2, 3, 4, 32]


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(2, 1, 65, 64), "images are [2, 1, 65, 64]; a Discriminator(size=2) takes"),
        (torch.zeros(2, 1, 32, 32), "[B, 1, 64, 64] (sides from 33 on)"),
        (torch.zeros(2, 3, 64, 64), "images are [2, 3, 64, 64]"),
        (torch.zeros(1, 64, 64), "images are [1, 64, 64]"),
    ],
    ids=["large", "small", "channels", "dimensions"],
)
def test_errors_of_images(images: Tensor, sentence: str) -> None:
    for call in (Discriminator(2), Discriminator(2).score):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call(images)


def test_values_out_of_range_are_refused() -> None:
    images = noise(3, dtype=torch.float32)
    discriminator = Discriminator(2)
    for wrong, said in (
        (images * 255, r"^3 of 3 images hold values outside \[0, 1\].*; divide by 255"),
        (images * 2 - 1, r"^3 of 3 .* scaled to \[-1, 1\]"),
        ((images * 255).byte(), r"^images are torch\.uint8; floating-point values"),
    ):
        for call in (discriminator.train(), discriminator.score, discriminator.eval()):
            with pytest.raises(ValueError, match=said):
                call(wrong)


def test_nan_is_refused_but_left_to_the_loss_in_training() -> None:
    images = noise(3, dtype=torch.float32)
    images[1, 0, 5, 5] = torch.nan
    discriminator = Discriminator(2)
    for call in (discriminator.eval(), discriminator.score):
        with pytest.raises(ValueError, match=r"^1 of 3 images hold NaN or infinite values"):
            call(images)
    assert discriminator.train()(images).isnan().all()  # batch norm spreads it


def test_errors_of_arguments() -> None:
    images = torch.zeros(1, 1, 64, 64)
    with pytest.raises(ValueError, match=r"size is 0; it must be the image side / 32"):
        Discriminator(0)
    with pytest.raises(ValueError, match=r"mode is 'batch'; it must be 'instance' or 'running'"):
        Discriminator(2).score(images, "batch")
    with pytest.raises(ValueError, match=r"mode 'instance' needs images larger than 32 x 32"):
        Discriminator(1).score(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"mode is 'batch'"):
        reference.discriminator_logits(reference.Discriminator(2), images, "batch")


@modes
def test_no_images_have_no_scores(mode: str) -> None:
    assert Discriminator(2).score(torch.zeros(0, 1, 64, 64), mode).shape == (0,)
