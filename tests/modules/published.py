"""Models seen as the published code sees them, for comparisons with it and with the reference."""

from __future__ import annotations

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


def assert_same_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float
) -> None:
    """Equal names, and values to this share of the largest of all."""
    assert actual.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        difference = float((actual[key] - value).abs().max())
        assert difference <= bound * largest, (key, difference / largest)
