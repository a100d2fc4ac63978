"""Variants of the in-painting block, each against a plain computation of what it says it does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from squid_fast import SQUID, Bundle, Discriminator, MemoryMatrix, MemoryQueue, Scorer
from squid_fast.experiments.published import published_way
from squid_fast.inference import calibrate, load_bundle, save_bundle
from squid_fast.modules.inpaint import InpaintBlock
from tests.factories import image_batch, image_set, tiny_squid
from tests.modules.published import cancelled_biases, update_queues

ALL: list[Any] = [
    None,
    False,
    {"memory": "shared"},
    {"memory": "matrix"},
    {"mixing": "convolution"},
    {"shortcut": "soft"},
    {"memory": "shared", "mixing": "convolution", "shortcut": "soft"},
]


def model(inpainting: Any, **others: Any) -> SQUID:
    return tiny_squid(inpainting=inpainting, num_slots=6, **others)


def block(**variant: str) -> InpaintBlock:
    torch.manual_seed(0)
    return InpaintBlock(16, 6, 4, 144, 3, **variant)


def looked_up(queries: Tensor, slots: Tensor, k: int) -> Tensor:
    """Answers [n, C] of queries [n, C] from slots [M, C], one at a time."""
    answers = []
    for q in queries.double():
        p = torch.softmax(slots.double() @ q, dim=0)
        weights = torch.where(p > p.sort(descending=True).values[k - 1], p, 0)
        answers.append(weights / weights.sum() @ slots.double())
    return torch.stack(answers)


def test_a_shared_queue_answers_all_places_from_the_same_slots() -> None:
    own = block(memory="shared").train()
    features = torch.randn(5, 4, 144)
    answers = own.memory(features)
    slots = own.memory.slots
    assert slots.shape == (1, 24, 144)  # the slots of all places together
    torch.testing.assert_close(
        answers.flatten(0, 1).double(), looked_up(features.flatten(0, 1), slots[0], 3),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    swapped = own.memory(features.flip(1))
    torch.testing.assert_close(swapped, answers.flip(1))
    own.memory(features)
    own.memory.update()
    assert torch.equal(slots[0, :20], features.flatten(0, 1))
    assert int(own.memory.ptr) == 20


def test_a_matrix_learns_its_slots_and_is_never_written() -> None:
    network = model({"memory": "matrix"}).train()
    assert not [m for m in network.modules() if isinstance(m, MemoryQueue)]
    memory = network.inpaint_block.memory
    assert isinstance(memory, MemoryMatrix)
    features = torch.randn(5, 4, 144)
    for n in range(4):
        torch.testing.assert_close(
            memory(features)[:, n].detach().double(),
            looked_up(features[:, n], memory.slots[n].detach(), 3),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    network(image_batch(2))["recon"].square().mean().backward()
    assert float(memory.slots.grad.abs().max()) > 0


def test_a_convolution_mixes_the_answers_of_the_neighbours() -> None:
    torch.manual_seed(1)
    own = InpaintBlock(16, 6, 9, 16, 3, mixing="convolution").double().eval()
    features = torch.randn(2, 9, 16).double()
    answers, mixed = own._convolve(features)
    weight, bias = own.convolution.weight, own.convolution.bias
    for b, row, column in itertools.product(range(2), range(3), range(3)):
        expected = bias.clone()
        for down, right in itertools.product((-1, 0, 1), repeat=2):
            r, c = row + down, column + right
            if 0 <= r < 3 and 0 <= c < 3:
                tap = weight[:, :, down + 1, right + 1]
                expected = expected + tap @ answers[b, 3 * r + c]
        torch.testing.assert_close(mixed[b, 3 * row + column], expected)
    assert not any(name.startswith("attention") for name in own.state_dict())


def test_a_soft_shortcut_blends_everywhere_and_only_in_training() -> None:
    own = block(shortcut="soft")
    own.mask_ratio = 0.8
    x = torch.rand(8, 16, 6, 6)
    inpainted: list[Tensor] = []
    own.bottleneck_conv2.register_forward_hook(lambda m, given, out: inpainted.append(out))
    mixed = own.train()(x)
    torch.testing.assert_close(mixed, 0.8 * inpainted[0] + 0.2 * x)
    assert torch.equal(own.eval()(x), inpainted[1])


def test_without_the_block_the_decoder_is_fed_what_the_encoder_found() -> None:
    network = model(False).eval()
    batch = image_batch(3)
    features, skips = network.encode(batch)
    assert torch.equal(network(batch)["recon"], network.decode(features, skips)[0])


def test_the_published_block_is_what_it_was() -> None:
    plain, explicit = model(None), model({"memory": "queue", "mixing": "attention"})
    assert "inpainting" not in plain.config
    assert plain.state_dict().keys() == explicit.state_dict().keys()
    assert all(torch.equal(v, explicit.state_dict()[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("inpainting", ALL, ids=str)
def test_a_variant_is_saved_loaded_and_scored(inpainting: Any, tmp_path: Path) -> None:
    network, discriminator = model(inpainting).train(), Discriminator(2).train()
    with torch.no_grad():
        network.out_conv.conv.weight *= 30
        discriminator(network(image_batch(8))["recon"])
    update_queues(network)
    pair = network.eval(), discriminator.eval()
    save_bundle(Bundle(*pair, calibrate(*pair, image_set(20), precision="float32")), tmp_path)
    loaded = load_bundle(tmp_path)
    for name, value in network.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name]), name
    for name, queue in network.named_modules():
        if isinstance(queue, MemoryQueue):
            assert int(queue.ptr) == int(loaded.model.get_submodule(name).ptr) > 0
    batch = image_batch(5)
    scorer = Scorer.load(tmp_path, precision="float32", device="cpu")
    found = scorer.score(batch, reconstruction=True).reconstruction
    with torch.no_grad():
        expected = network(batch)["recon"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    program = scorer.to_torch_export()
    torch.testing.assert_close(program.module()(batch)[3], found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inpainting", ALL, ids=str)
def test_a_variant_trains(inpainting: Any) -> None:
    network = model(inpainting).train()
    outputs = network(image_batch(4))
    (outputs["recon"].square().mean() + outputs["dist_loss"]).backward()
    missing = {n for n, p in network.named_parameters() if p.grad is None and "teacher" not in n}
    names = {name for name, _ in network.named_parameters() if "teacher" not in name}
    assert missing == cancelled_biases(names)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory is 'lstm'; it must be one of queue, shared"):
        model({"memory": "lstm"})
    with pytest.raises(ValueError, match="inpainting has 'memories'; known are memory, mixing"):
        model({"memories": "queue"})
    bundle = Bundle(model(False), Discriminator(2))
    with pytest.raises(ValueError, match="inpainting=False, a variant that was never published"):
        published_way(bundle, torch.device("cpu"))
