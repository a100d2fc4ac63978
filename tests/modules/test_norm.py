"""Sequences of convolutions and batch norms, against the same layers one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squid_fast import SQUID, Discriminator
from squid_fast.modules import freeze_cancelled_biases
from squid_fast.modules.norm import NormSequential
from tests.factories import image_batch, tiny_squid
from tests.modules.published import cancelled_biases
from tests.tolerances import assert_close


def conv(width: int = 4) -> nn.Conv2d:
    return nn.Conv2d(width, 4, 3, padding=1)


SEQUENCES: dict[str, Any] = {
    "as in a stage": lambda: [conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4)],
    "as in the discriminator": lambda: [
        nn.Conv2d(4, 4, 5, 2, 2), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 5, 2, 2), nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2),
    ],
    "without a bias": lambda: [nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()],
    "with a plain mean": lambda: [conv(), nn.BatchNorm2d(4, momentum=None), nn.ReLU()],
    "with another activation": lambda: [conv(), nn.BatchNorm2d(4), nn.Tanh(), conv()],
    "with layers of other kinds": lambda: [
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.ReLU(),
        conv(), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False),
        conv(), nn.InstanceNorm2d(4),
    ],
}  # fmt: skip


def pair(name: str) -> tuple[NormSequential, nn.Sequential]:
    """Ours and PyTorch's of the same layers in float64."""
    own = NormSequential(*SEQUENCES[name]()).double()
    with torch.no_grad():
        for value in own.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return own, nn.Sequential(*copy.deepcopy(list(own)))


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_the_layers_one_by_one(name: str, added: bool, training: bool) -> None:
    own, plain = pair(name)
    own.train(training), plain.train(training)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    residual = torch.randn_like(plain(x)) if added else None
    plain = nn.Sequential(*copy.deepcopy(list(own)))  # whose statistics have not moved
    inputs = [[z.clone().requires_grad_() for z in (x, residual) if z is not None] for _ in "ab"]
    found = own(*inputs[0])
    expected = plain(inputs[1][0])
    if added:
        expected = F.relu(expected + inputs[1][1])
    assert_close(found, expected)
    if not training:
        assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    found.backward(grad), expected.backward(grad)
    for ours, theirs in zip(*inputs, strict=True):
        assert_close(ours.grad, theirs.grad)
    largest = max(float(p.grad.abs().max()) for p in plain.parameters())
    for (key, ours), theirs in zip(own.named_parameters(), plain.parameters(), strict=True):
        gradient = torch.zeros_like(ours) if ours.grad is None else ours.grad
        assert (gradient - theirs.grad).abs().max() <= 1e-11 * largest, key
        assert (ours.grad is None) == (training and key in left_out(own)), key
    for key, value in plain.state_dict().items():
        assert_close(own.state_dict()[key].double(), value.double())


def left_out(own: NormSequential) -> set[str]:
    """Biases of plain convolutions in front of batch norms with all that PyTorch's has."""
    layers = list(own)
    return {
        f"{i}.bias"
        for i, norm in enumerate(layers[1:])
        if isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats
        if isinstance(layers[i], nn.Conv2d) and layers[i].padding_mode == "zeros"
    }


def test_one_value_a_channel_is_refused() -> None:
    own, _ = pair("as in a stage")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        own(torch.zeros(1, 4, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("layer", range(5))
def test_layers_with_hooks_are_called(layer: int) -> None:
    own, plain = pair("as in a stage")
    seen: list[Tensor] = []
    own[layer].register_forward_hook(lambda module, given, out: seen.append(out.clone()))
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    assert_close(own(x), plain(x))
    assert_close(seen[0], plain[: layer + 1](x))


class Doubled(nn.BatchNorm2d):
    """A batch norm that does something of its own, as synchronised ones do."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_other_batch_norms_are_called() -> None:
    own, plain = pair("as in a stage")
    own[4].__class__ = Doubled
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    assert_close(own(x), 2 * plain(x))


def test_a_copy_and_a_part_are_what_they_were() -> None:
    own, plain = pair("as in a stage")
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    twin, part = copy.deepcopy(own), copy.deepcopy(own)[:3]
    assert own.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(twin(x), own(x))
    assert_close(part(x), plain[:3](x))


@pytest.mark.parametrize("network", [tiny_squid(), Discriminator(2)], ids=["model", "critic"])
def test_adam_leaves_cancelled_biases_alone(network: SQUID | Discriminator) -> None:
    """Its weight decay included, which moves a parameter without a gradient by full steps."""
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    adam = torch.optim.Adam(network.parameters(), 1e-2, weight_decay=1e-5, fused=True)
    outputs = network.train()(image_batch(4))
    if isinstance(outputs, dict):
        outputs = outputs["recon"] + outputs["teacher_recon"] + outputs["dist_loss"]
    outputs.square().mean().backward()
    adam.step()
    found = {n for n, p in network.named_parameters() if torch.equal(p, before[n])}
    if isinstance(network, SQUID):
        assert found == cancelled_biases(before)
    else:
        assert found == {f"conv_model.{i}.bias" for i in (2, 5, 8, 11)}
    freeze_cancelled_biases(network)
    assert found == {n for n, p in network.named_parameters() if not p.requires_grad}
