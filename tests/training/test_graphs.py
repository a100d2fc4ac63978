"""Training steps as CUDA graphs: when they are captured, and that they train alike."""

from __future__ import annotations

import copy
import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from squid_fast import SQUID, Discriminator
from squid_fast.presets import Recipe, preset
from squid_fast.training import make_optimizers, train
from squid_fast.training.graphs import WARM_UP, Losses, StepGraphs
from squid_fast.training.step import load_optimizer, set_learning_rate
from tests.factories import image_set


def test_every_kind_is_captured_once_and_replayed_on_the_images_of_its_step() -> None:
    seen: list[tuple[str, int, list[int]]] = []

    def step(chosen: Tensor, number: int) -> Losses:
        seen.append(("step", number % 2, chosen.tolist()))
        return {"loss": chosen.sum()}

    def capture(
        call: Callable[[], Losses], device: torch.device
    ) -> tuple[Callable[[], None], Losses]:
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


def test_a_rate_in_a_tensor_is_written_where_it_is() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    tensor = torch.optim.Adam([weight], torch.tensor(0.1), fused=True, capturable=False)
    plain = torch.optim.Adam([weight], 0.1)
    rate = tensor.param_groups[0]["lr"]
    for optimizer in (tensor, plain):
        set_learning_rate(optimizer, 0.25)
        assert float(optimizer.param_groups[0]["lr"]) == 0.25
    assert tensor.param_groups[0]["lr"] is rate


def test_a_state_of_another_device_leaves_the_rates_where_they_are() -> None:
    model, discriminator = SQUID(**preset("small").model), Discriminator(2)
    optimizer, _ = make_optimizers(model, discriminator, Recipe(lr=0.5))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    # As a run on a GPU leaves it.
    state["param_groups"][0] |= {"capturable": True, "lr": torch.tensor(0.125)}
    fresh, _ = make_optimizers(model, discriminator, Recipe(lr=0.5))
    load_optimizer(fresh, state)
    assert fresh.param_groups[0]["lr"] == 0.125
    assert fresh.param_groups[0]["capturable"] is False
    fresh.step()  # which it would refuse with the other's


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_run_of_graphs_is_a_run_of_steps(tmp_path: Path) -> None:
    recipe = Recipe(batch_size=8, epochs=3, t_max=3, n_critic=2, validate_every=3, ema_decay=0.9)
    losses = []
    for graphs in (True, False):
        torch.manual_seed(0)
        model = SQUID(**preset("small").model)
        out = tmp_path / str(graphs)
        train(model, image_set(64), out, recipe, device="cuda", precision="float32", graphs=graphs)
        rows = csv.DictReader((out / "metrics.csv").read_text().splitlines())
        losses.append([float(r["value"]) for r in rows if r["name"].startswith("loss/")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    # A stopped run goes on with graphs.
    longer = dataclasses.replace(recipe, epochs=4)
    torch.manual_seed(0)
    again, out = SQUID(**preset("small").model), tmp_path / "True"
    options = {"device": "cuda", "precision": "float32", "resume": True}
    assert train(again, image_set(64), out, longer, **options).step == 32
