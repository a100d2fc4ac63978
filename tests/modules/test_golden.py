"""The published implementation's own tensors, against squid_fast and against the reference.

In evaluation float32 reproduces them to a few roundings. In training batch norm over few values
and the kinks of ReLU magnify rounding, so that correct float32 programs differ from one another by
up to 6e-3 of the largest gradient: gradients are compared in float64, with what the published
implementation computes in float64 (``golden64``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squid_fast
from squid_fast import reference
from tests.conftest import Golden
from tests.factories import open_masks
from tests.modules.published import (
    assert_same_gradients,
    cancelled_biases,
    gradients,
    update_queues,
)
from tests.tolerances import assert_close, error

EXACT = 1e-10  # in float64, of the largest entry; found up to 3e-14
TRAINING = 5e-5  # in float32, outputs in training mode, of the largest entry; found up to 3.2e-5

models = pytest.mark.parametrize("name", ["cxr_top5", "cxr_hard_shrink", "digit_top5"])
rooms = pytest.mark.parametrize("room", [squid_fast, reference], ids=["fast", "reference"])

Load = Callable[[str], Golden]


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def build(room: ModuleType, golden: Golden, dtype: torch.dtype = torch.float32) -> Any:
    metadata, tensors = golden
    model = room.SQUID(**json.loads(metadata["config"])).to(dtype)
    model.load_state_dict(part(tensors, "state."), strict=True)
    return model


def build_discriminator(room: ModuleType, golden: Golden) -> Any:
    metadata, tensors = golden
    discriminator = room.Discriminator(size=int(metadata["disc_size"]))
    discriminator.load_state_dict(part(tensors, "disc_state."), strict=True)
    return discriminator.eval()


def train_once(
    model: nn.Module, images: Tensor
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Outputs, loss (that of the metadata) and gradients of one step with every mask open."""
    open_masks(model.train())
    outputs = model(images)
    loss = (
        10 * F.mse_loss(outputs["recon"], images)
        + 0.5 * F.mse_loss(outputs["teacher_recon"], images)
        + 0.1 * outputs["dist_loss"]
    )
    loss.backward()
    return outputs, loss.detach(), gradients(model)


@models
def test_this_is_the_loss_of_the_metadata(golden: Load, name: str) -> None:
    metadata, _ = golden(name)
    assert metadata["loss"] == "10*mse(recon,x)+0.5*mse(teacher_recon,x)+0.1*dist_loss"


@rooms
@models
def test_evaluation(golden: Load, name: str, room: ModuleType) -> None:
    data = golden(name)
    model, discriminator = build(room, data).eval(), build_discriminator(room, data)
    _, tensors = data
    with torch.no_grad():
        outputs = model(tensors["input"])
        expected = part(tensors, "eval.")
        assert set(outputs) == set(expected)
        for key, value in expected.items():
            assert_close(outputs[key].reshape(value.shape), value)

        recon = outputs["recon"]
        assert_close(discriminator(recon), tensors["disc.recon_logit"])
        assert_close(discriminator(tensors["input"]), tensors["disc.input_logit"])
        if room is reference:
            scores = reference.discriminator_logits(discriminator, recon)
        else:
            scores = discriminator.score(recon)
        # Statistics of one image, the last over four pixels: as sensitive as training.
        assert_close(scores[:, None], tensors["disc.instance_logit"], TRAINING)


@rooms
@models
def test_state_dict_has_the_published_keys_and_values(
    golden: Load, name: str, room: ModuleType
) -> None:
    data = golden(name)
    for module, prefix in (
        (build(room, data), "state."),
        (build_discriminator(room, data), "disc_state."),
    ):
        state, expected = module.state_dict(), part(data[1], prefix)
        assert set(state) == set(expected)
        assert all(torch.equal(state[key], value) for key, value in expected.items())


@rooms
@pytest.mark.parametrize("name", ["cxr_top5", "cxr_hard_shrink"])
def test_training_in_float64(golden: Load, golden64: Load, name: str, room: ModuleType) -> None:
    assert_same_step(step_in_float64(room, golden(name)), golden64(name)[1])


def test_training_in_float64_on_digits(golden: Load) -> None:
    """Of which there is a float32 file only, whose gradients happen to lie far from every kink."""
    data = golden("digit_top5")
    exact = step_in_float64(reference, data)
    assert_same_step(exact, data[1], TRAINING, 1e-6, 1e-4)
    assert_same_step(step_in_float64(squid_fast, data), exact)


def step_in_float64(room: ModuleType, data: Golden) -> dict[str, Tensor]:
    """Results of one training step, named as in the golden files."""
    model, images = build(room, data, torch.float64), data[1]["input"].double()
    outputs, loss, found = train_once(model, images)
    results = {f"train.{key}": value.detach() for key, value in outputs.items()}
    return results | {"train.loss": loss} | {f"grad.{k}": v for k, v in found.items()}


def assert_same_step(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    images: float = EXACT,
    losses: float = EXACT,
    of_gradients: float = EXACT,
) -> None:
    """Outputs to these shares of their largest entry, gradients to that of the largest of all."""
    for key, value in part(expected, "train.").items():
        bound = losses if key.endswith("loss") else images
        assert_close(actual[f"train.{key}"].reshape(value.shape), value, bound)
    assert_same_gradients(part(actual, "grad."), part(expected, "grad."), of_gradients)


@rooms
@models
def test_queue_and_statistics_after_a_step(golden: Load, name: str, room: ModuleType) -> None:
    data = golden(name)
    model, (_, tensors) = build(room, data), data
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_once(model, tensors["input"])
    update_queues(model)
    state, expected = model.state_dict(), part(tensors, "after.")
    for key, value in expected.items():
        assert_close(state[key], value, 0.0 if key.endswith("tracked") else TRAINING)
        if key.endswith("memMatrix"):
            untouched = (value == before[key]).all(dim=1)
            assert untouched.sum() == value.shape[0] - 3  # a batch of three
            assert torch.equal(state[key][untouched], value[untouched])


@models
def test_float32_training_step(golden: Load, name: str) -> None:
    # As users run it: here the gradients agree as a whole, not each of them.
    data = golden(name)
    _, tensors = data
    outputs, loss, found = train_once(build(squid_fast, data), tensors["input"])
    for key in ("recon", "patch", "teacher_recon", "dist_loss", "embedding"):
        value = tensors[f"train.{key}"]
        assert error(outputs[key].detach().reshape(value.shape), value) <= 2e-4, key
    assert error(loss.view(1), tensors["train.loss"]) <= 1e-5
    expected = part(tensors, "grad.")
    # Nothing is computed for biases that a batch norm cancels: in ``expected`` they are noise.
    found |= {k: torch.zeros_like(expected[k]) for k in cancelled_biases(expected)}
    both = [(found[k].flatten(), v.flatten()) for k, v in expected.items()]
    ours, theirs = (torch.cat(x).double() for x in zip(*both, strict=True))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.9999
    assert error(ours.norm(), theirs.norm()) < 5e-3


# --- operations -----------------------------------------------------------------------------------


GUMBEL = ["allequal", "k1", "kM", "nearties", "peaked", "plain", "ties"]
HARD = ["allbelow", "big", "plain"]


def operations(room: ModuleType) -> ModuleType:
    return room.ops if room is squid_fast else room


def test_no_golden_case_is_left_out(golden: Load) -> None:
    _, tensors = golden("ops")
    assert {key.split(".")[0] for key in part(tensors, "gumbel.")} == set(GUMBEL)
    assert {key.split(".")[0] for key in part(tensors, "hard.")} == set(HARD)


def assert_gradients(
    result: Tensor, t: dict[str, Tensor], tolerance: float | None = None, **inputs: Tensor
) -> None:
    """Of a golden file's inputs by name, for its upstream gradient."""
    found = torch.autograd.grad(result, list(inputs.values()), t["grad_out"])
    for name, grad in zip(inputs, found, strict=True):
        expected = t[f"grad_{name}"]
        assert_close(grad.view(expected.shape), expected, tolerance)


@rooms
@pytest.mark.parametrize("case", GUMBEL)
def test_gumbel_shrinkage(golden: Load, case: str, room: ModuleType) -> None:
    t = part(golden("ops")[1], f"gumbel.{case}.")
    logits = t["logits"].requires_grad_()
    weights = operations(room).gumbel_shrinkage(logits, int(t["k"]))
    # Below 1e-30 the published p + (h - p) has lost h to rounding; squid_fast has it still.
    assert torch.equal(weights > 1e-30, t["weights"] > 1e-30)
    assert_close(weights, t["weights"], floor=1e-6)
    assert_gradients(weights, t, logits=logits)


@rooms
@pytest.mark.parametrize("case", HARD)
def test_hard_shrinkage(golden: Load, case: str, room: ModuleType) -> None:
    t = part(golden("ops")[1], f"hard.{case}.")
    logits = t["logits"].requires_grad_()
    weights = operations(room).hard_shrinkage(logits, float(t["lambd"]))
    assert torch.equal(weights != 0, t["weights"] != 0)
    assert_close(weights, t["weights"])
    assert_gradients(weights, t, logits=logits)


@rooms
def test_queue(golden: Load, room: ModuleType) -> None:
    t = part(golden("ops")[1], "queue.")
    queue = room.MemoryQueue(10, 4, 3).train()
    queue.load_state_dict({"memMatrix": t["initial"]}, strict=True)
    for i in range(7):
        queue(t[f"values{i}"])
        queue.update()
        assert torch.equal(queue.state_dict()["memMatrix"], t[f"after{i}"]), i
        assert int(queue.ptr) == int(t[f"ptr{i}"]), i
    query = t["query"].requires_grad_()
    answer = queue.eval()(query)
    assert_close(answer, t["out"])
    assert_gradients(answer, t, query=query)


@rooms
def test_matrix(golden: Load, room: ModuleType) -> None:
    t = part(golden("ops")[1], "matrix.")
    matrix = room.MemoryMatrix(16, 6, 4)
    matrix.load_state_dict({"memMatrix": t["memory"]}, strict=True)
    (slots,) = matrix.parameters()
    query = t["query"].requires_grad_()
    answer = matrix(query)
    assert_close(answer, t["out"])
    assert_gradients(answer, t, query=query, memory=slots)
