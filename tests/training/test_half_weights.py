"""Weights in bfloat16, cast by one operation, against what autocast casts one by one."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from squid_fast.modules import SQUID, Discriminator, freeze_cancelled_biases
from squid_fast.presets import Recipe
from squid_fast.training import squid
from squid_fast.training.half_weights import HalfWeights
from squid_fast.training.state import Settings
from tests.factories import DECODER_MEMORY, SIDE, decoder_memory, image_batch, tiny_squid
from tests.processor import needs_bf16

pytest.importorskip("lightning_fabric")


def learner(model: SQUID, recipe: Recipe | None = None) -> squid.SquidLearner:
    settings = Settings(model.config, recipe or Recipe(batch_size=4), 0, "bf16", 4, "")
    return squid.SquidLearner(model, settings, torch.device("cpu"))


def steps(model: SQUID, count: int = 4) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses of the steps of a new learner, and the weights and averages after them."""
    of = learner(model, Recipe(batch_size=4, lr=1e-3, weight_decay=0.01, ema_decay=0.9))
    torch.manual_seed(1)
    losses = []
    for number in range(count):
        found = of.step(image_batch(4), number)
        losses.append({name: float(loss) for name, loss in found.items()})
    return losses, {
        f"{part}.{name}": value
        for part, module in of.modules.items()
        for name, value in module.state_dict().items()
    }


@needs_bf16
@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_memory": DECODER_MEMORY},
        {"decoder_memory": decoder_memory("MemoryMatrixBlock", 36, 4)},
        {"inpainting": {"mixing": "convolution", "memory": "matrix"}},
        {"dist": False},
    ],
    ids=["memory", "windows", "variant", "no teacher"],
)
def test_steps_have_the_bits_of_autocast(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, state = steps(tiny_squid(**changes))
    monkeypatch.setattr(squid, "HalfWeights", lambda module: module)
    expected_losses, expected = steps(tiny_squid(**changes))
    assert losses == expected_losses
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


class _Calls(TorchDispatchMode):
    """Counts operations by name, and casts by the shape of what they cast."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.cast: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.names[name] += 1
        if name == "_to_copy":
            self.cast[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


@needs_bf16
def test_a_call_casts_all_weights_at_once() -> None:
    model = tiny_squid(decoder_memory=DECODER_MEMORY)
    of, images = learner(model), image_batch(4)
    with _Calls() as calls:
        of.step(images, 0)
    # The generator, and the discriminator three times: real, painted, and judging; and back.
    assert calls.names["_foreach_copy_"] == 4 + 3
    kernels = {tuple(p.shape) for p in model.parameters() if p.dim() == 4}
    assert len(kernels) > 5
    assert not kernels & calls.cast.keys()


def test_what_is_cast() -> None:
    model = tiny_squid(decoder_memory=DECODER_MEMORY)
    freeze_cancelled_biases(model)
    half = HalfWeights(model)
    parts = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        part = parts[name.rpartition(".")[0]]
        norm = isinstance(part, nn.BatchNorm2d | nn.LayerNorm)
        kept = norm or not parameter.requires_grad or name.endswith("in_proj_bias")
        assert (name in half._names) != kept, name


def test_gradients_reach_float32_parameters_in_their_layout() -> None:
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    other = copy.deepcopy(conv)
    x = torch.randn(2, 3, 8, 8)
    HalfWeights(conv)(x.bfloat16()).float().square().sum().backward()
    other.bfloat16()(x.bfloat16()).float().square().sum().backward()
    for ours, theirs in zip(conv.parameters(), other.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        assert torch.equal(ours.grad, theirs.grad.float())
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_parameter_that_is_not_used_has_no_gradient() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    module = Half()
    HalfWeights(module)(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    assert module.used.weight.grad is not None
    assert module.other.weight.grad is None


def test_frozen_weights_take_no_gradient_but_pass_it_on() -> None:
    discriminator = Discriminator(2)
    half = HalfWeights(discriminator.bfloat16().float())
    discriminator.requires_grad_(False)
    images = torch.rand(2, 1, SIDE, SIDE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        half(images).sum().backward()
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_the_module_keeps_its_parameters() -> None:
    layer = nn.Linear(2, 2)
    before = dict(layer.named_parameters())
    HalfWeights(layer)(torch.ones(1, 2, dtype=torch.bfloat16))
    assert dict(layer.named_parameters()) == before
    with pytest.raises(RuntimeError):
        HalfWeights(layer)(torch.ones(1, 3, dtype=torch.bfloat16))
    assert all(a is b for a, b in zip(layer.parameters(), before.values(), strict=True))
