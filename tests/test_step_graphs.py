"""Training steps as CUDA graphs: when they are captured, and that they train alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from squid_fast.training.graphs import WARM_UP, Losses, StepGraphs


def test_every_kind_is_captured_once_and_replayed_on_the_images_of_its_step() -> None:
    seen: list[tuple[str, int, list[int]]] = []

    def step(chosen: Tensor, number: int) -> Losses:
        seen.append(("step", number % 2, chosen.tolist()))
        return {"loss": chosen.sum()}

    def capture(call: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
        losses = call()
        kind = seen.pop()[1]  # capturing runs nothing

        def replay() -> None:
            losses["loss"].copy_(call()["loss"])
            _, _, chosen = seen.pop()
            seen.append(("replay", kind, chosen))

        return replay, losses

    graphs = StepGraphs(step, lambda number: number % 2, capture)
    steps = 2 * WARM_UP + 5
    for number in range(steps):
        losses = graphs(torch.tensor([number, 2 * number]), number)
        assert int(losses["loss"]) == 3 * number
    assert [name for name, _, _ in seen] == ["step"] * 2 * WARM_UP + ["replay"] * 5
    assert [kind for _, kind, _ in seen] == [number % 2 for number in range(steps)]
    assert [chosen for _, _, chosen in seen] == [[n, 2 * n] for n in range(steps)]
