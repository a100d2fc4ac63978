"""Models seen as the published code sees them, for comparisons with it and with the reference."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from squid_fast import MemoryQueue, reference


def published(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """``values`` of a model's parameters under their published names: each memory has its own."""
    named: dict[str, Tensor] = {}
    for name, value in values.items():
        stem, _, last = name.rpartition(".")
        if last != "slots":
            named[name] = value
        elif model.get_submodule(stem).single:
            named[f"{stem}.memMatrix"] = value[0]
        else:
            named |= {f"{stem}.{i}.memMatrix": slots for i, slots in enumerate(value)}
    return named


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients under the published names; those that stayed None are left out."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return published(model, found)


def update_queues(*models: nn.Module) -> None:
    """What the published training loop does after a step."""
    for model in models:
        for module in model.modules():
            if isinstance(module, (MemoryQueue, reference.MemoryQueue)):
                module.update()


def cancelled_biases(names: Iterable[str]) -> set[str]:
    """Which of a model's parameters are biases of convolutions in front of batch norms."""
    block = r"(conv|mpconv)\.conv[12]\.[03]\.bias|bottleneck_conv2\.0\.bias"
    return {name for name in names if re.search(block, name)}


def assert_same_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float
) -> None:
    """Equal names, and values to this share of the largest of all.

    Biases that a batch norm cancels have no gradient in ``actual``, where they are left out of
    training: that must be right, which is to say that all of theirs is less than the bound.
    """
    left_out = expected.keys() - actual.keys()
    if left_out:
        assert left_out == cancelled_biases(expected)
    assert actual.keys() <= expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        found = torch.zeros_like(value) if key in left_out else actual[key]
        difference = float((found - value).abs().max())
        assert difference <= bound * largest, (key, difference / largest)
