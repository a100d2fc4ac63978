"""The generator: against the reference in float64, its state dicts, presets, errors."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from squid_fast import (
    PRESETS,
    SQUID,
    Discriminator,
    InpaintBlock,
    MemoryMatrix,
    MemoryQueue,
    reference,
)
from squid_fast.modules.images import check_values
from squid_fast.ops.patches import to_image, to_patches
from tests.factories import TINY, open_masks
from tests.modules.published import assert_same_gradients, gradients, published, update_queues
from tests.tolerances import assert_close, error

# The sum of float64 roundings over a whole network, magnified by batch norm in training.
EXACT = 1e-9

V1, V3, V4 = "MemoryMatrixBlock", "MemoryMatrixBlockV3", "MemoryMatrixBlockV4"


def memory(kind: str, multiplier: int, num_memory: int) -> dict[str, Any]:
    return {"type": kind, "multiplier": multiplier, "num_memory": num_memory}


# Maps of 2 x 2 per patch: images of 16 x 16.
BASE = TINY | {"num_slots": 9, "memory_channel": 16, "initial_combine": None, "mem_num_slots": 7}
CONFIGS: dict[str, dict[str, Any]] = {
    "combine none": {},
    "combine 1": {"initial_combine": 1},
    "combine L": {"initial_combine": 2},
    "all concat": {"ops": ["concat", "concat"], "initial_combine": 1},
    "none of the skips": {"ops": ["none", "none"], "initial_combine": 2},
    "a single patch": {"num_patch": 1},
    "nine patches, two channels": {"num_patch": 3, "num_in_ch": 2, "initial_combine": 1},
    "no teacher": {"dist": False, "initial_combine": 1},
    "hard shrinkage": (
        {"shrink_thres": 0.01, "initial_combine": 1, "decoder_memory": [None, memory(V1, 4, 4)]}
    ),
    "no shrinkage": {"shrink_thres": 0, "decoder_memory": [memory(V3, 64, 4), None]},
    "windows of the image and of patches": (
        {"initial_combine": 1, "decoder_memory": [memory(V1, 64, 4), memory(V1, 4, 4)]}
    ),
    "memories of patches": {"initial_combine": 1, "decoder_memory": [None, memory(V3, 16, 4)]},
    "one memory for all": (
        {"initial_combine": 1, "decoder_memory": [memory(V4, 256, 4), memory(V4, 16, 1)]}
    ),
    "three levels": (
        {
            "level": 3,
            "memory_channel": 32,
            "initial_combine": 2,
            "ops": ["concat", "none", "concat"],
        }
    ),
    "five levels": {"level": 5, "memory_channel": 16, "ops": ["none", "concat"] * 2 + ["none"]},
}
configs = pytest.mark.parametrize("name", CONFIGS)


def pair(name: str) -> tuple[SQUID, reference.SQUID]:
    """A model and its reference, in float64, with the same weights and open masks."""
    config = BASE | CONFIGS[name]
    model, plain = SQUID(**config).double(), reference.SQUID(**config).double()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(0.2 * torch.randn_like(value))
        # Statistics of data, without which evaluation ends in dead units and constant images.
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        model.train()(images_for(model))
        for norm in norms:
            norm.momentum = 0.1
        model.inpaint_block.memory.pending = None
    plain.load_state_dict(model.state_dict(), strict=True)
    open_masks(model, plain)
    return model, plain


def images_for(model: SQUID, B: int = 3) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.rand(B, model.num_in_ch, model.image_size, model.image_size, dtype=dtype)


def loss_of(outputs: dict[str, Tensor | None], images: Tensor, dist_w: float) -> Tensor:
    recon, teacher = outputs["recon"], outputs["teacher_recon"]
    assert recon is not None
    loss = 10 * F.mse_loss(recon, images)
    if teacher is not None and outputs["dist_loss"] is not None:
        loss = loss + 0.5 * F.mse_loss(teacher, images) + dist_w * outputs["dist_loss"]
    return loss


@configs
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dist_w", [0.0, 0.1])
def test_equals_reference(name: str, training: bool, dist_w: float) -> None:
    model, plain = pair(name)
    images = images_for(model)
    outputs, expected = model.train(training)(images), plain.train(training)(images)
    assert list(outputs) == list(expected)
    for key, value in expected.items():
        if value is None:
            assert outputs[key] is None
        else:
            assert_close(outputs[key], value, EXACT)

    loss_of(outputs, images, dist_w).backward()
    loss_of(expected, images, dist_w).backward()
    assert_same_gradients(gradients(model), gradients(plain), EXACT)

    update_queues(model, plain)
    state = model.state_dict()
    for key, value in plain.state_dict().items():
        assert_close(state[key].double(), value.double(), EXACT)


def test_input_gradient_equals_reference() -> None:
    model, plain = pair("windows of the image and of patches")
    images = images_for(model).requires_grad_()
    found = [
        torch.autograd.grad(F.mse_loss(m(images)["recon"], images.detach()), images)[0]
        for m in (model.train(), plain.train())
    ]
    assert_close(*found, EXACT)


def test_teacher_does_not_teach_the_encoder_but_learns_from_the_distillation() -> None:
    model, _ = pair("combine 1")
    outputs = model.train()(images_for(model))
    assert outputs["teacher_recon"] is not None
    outputs["teacher_recon"].sum().backward()
    assert {key.split(".")[0] for key in gradients(model)} == {"teacher_ups", "teacher_out"}
    model.zero_grad()
    outputs = model(images_for(model))
    assert outputs["dist_loss"] is not None
    outputs["dist_loss"].backward()
    taught = {k.split(".")[0] for k, g in gradients(model).items() if g.abs().max() > 0}
    assert taught == {"in_conv", "down_blocks", "inpaint_block", "up_blocks", "teacher_ups"}


def test_without_the_teacher_the_student_is_the_same() -> None:
    model, _ = pair("combine 1")
    images, calls = images_for(model), []
    whole = model.eval()(images)
    for part in (*model.teacher_ups, model.teacher_out):
        part.register_forward_hook(lambda *_: calls.append(1))
    without = model(images, teacher=False)
    assert not calls
    assert without["teacher_recon"] is None
    assert without["dist_loss"] is None
    for key in ("recon", "patch", "embedding"):
        assert torch.equal(without[key], whole[key])


def test_a_model_without_teacher_is_the_student_of_one_with() -> None:
    model, _ = pair("combine 1")
    alone = SQUID(**model.config | {"dist": False}).double().eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("teacher_")}
    alone.load_state_dict(state, strict=True)
    images = images_for(model)
    assert torch.equal(alone(images)["recon"], model.eval()(images)["recon"])


def test_patch_is_the_reconstruction_cut_up() -> None:
    model, _ = pair("nine patches, two channels")
    outputs = model.eval()(images_for(model))
    recon, patch = outputs["recon"], outputs["patch"]
    side = model.image_size // 3
    for b in range(3):
        for n in range(9):
            rows, columns = (slice(side * i, side * (i + 1)) for i in divmod(n, 3))
            assert torch.equal(patch[9 * b + n], recon[b, :, rows, columns])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("P", "shape"), [(1, (2, 3, 4, 4)), (2, (3, 5, 4, 6)), (3, (1, 1, 9, 3))])
def test_patches_and_image(P: int, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.randn(shape).to(memory_format=layout)
    patches = to_patches(x, P)
    assert torch.equal(patches, reference.squid.to_patches(x, P))
    assert torch.equal(to_image(patches, P), x)
    if layout == torch.channels_last:
        assert patches.is_contiguous(memory_format=layout)


# --- masked shortcut and dropout in the model -----------------------------------------------------


def test_masks_are_drawn_anew_and_repeat_under_a_seed() -> None:
    model, _ = pair("combine 1")
    model.inpaint_block.mask_ratio = 0.5
    images = images_for(model)
    runs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        runs.append(model.train()(images, teacher=False)["recon"])
    assert not torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_closed_masks_let_the_features_pass() -> None:
    block = pair("combine 1")[0].inpaint_block.train()
    block.mask_ratio = 0.0
    x = torch.randn(8, 16, 2, 2, dtype=torch.float64)
    assert torch.equal(block(x), x)


def test_the_models_ratio_does_not_reach_the_decoder_memories() -> None:
    entries = [memory(V1, 64, 4), memory(V3, 16, 4) | {"ratio": 0.5}]
    model = SQUID(**BASE | {"initial_combine": 1, "ratio": 0.25, "decoder_memory": entries})
    ratios = [m.mask_ratio for m in model.modules() if hasattr(m, "mask_ratio")]
    assert ratios == [0.25, 0.95, 0.5]


def test_evaluation_has_neither_masks_nor_dropout() -> None:
    model = SQUID(**BASE | {"ratio": 0.5, "drop": 0.5}).eval()
    images = images_for(model)
    assert torch.equal(model(images)["recon"], model(images)["recon"])
    assert not torch.equal(model.train()(images)["recon"], model(images)["recon"])


def test_evaluation_does_not_depend_on_the_batch() -> None:
    model, _ = pair("windows of the image and of patches")
    images = images_for(model, 5)
    whole = model.eval()(images)["recon"]
    assert_close(torch.cat([model(x)["recon"] for x in images.split([1, 4])]), whole, EXACT)


# --- in-painting block ----------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 4, 9, 16, 25])
def test_code_of_the_patch_index(N: int) -> None:
    block = InpaintBlock(16, 5, N, 16, 3)
    bits = len(f"{N:b}")  # floor(log2 N) + 1
    assert block.code.tolist() == [[int(digit) for digit in f"{n:0{bits}b}"] for n in range(N)]
    assert torch.equal(reference.inpaint.patch_code(N), block.code)
    assert block.bottleneck_conv2[0].in_channels == 4 + bits


@pytest.mark.parametrize(("N", "h", "w"), [(1, 2, 2), (4, 2, 4), (9, 1, 8), (16, 4, 2)])
def test_block_equals_reference(N: int, h: int, w: int) -> None:
    arguments = (8, 6, N, 2 * h * w, 3, 1.0)
    block = InpaintBlock(*arguments).double()
    plain = reference.InpaintBlock(*arguments).double()
    plain.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2 * N, 8, h, w, dtype=torch.float64)
    for training in (False, True):
        assert_close(block.train(training)(x), plain.train(training)(x), EXACT)


@pytest.mark.parametrize("shrink_thres", [3, 0.2, 0])
def test_a_frozen_block_is_the_same_until_it_changes(shrink_thres: float) -> None:
    block = InpaintBlock(16, 6, 4, 16, shrink_thres).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(8, 16, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        plain = block(x)
        block.freeze()
        assert_close(block(x), plain)
        assert not torch.equal(block(x), plain)  # summed in another order
        assert torch.equal(block.train().eval()(x), plain)
        block.freeze()
        state = {name: 2 * value for name, value in block.state_dict().items()}
        block.load_state_dict(state)
        changed = block(x)
        block.freeze()
        assert_close(block(x), changed)
        assert not torch.allclose(changed, plain)
        # Nor does it outlive a change that the block is not told of.
        for change in (
            lambda: block.memory.slots.mul_(1.5),
            lambda: block.attention.in_proj_weight.add_(0.1),
            lambda: block.attention.load_state_dict(block.attention.state_dict()),
        ):
            block.freeze()
            change()
            held = block(x)
            assert torch.equal(held, block.train().eval()(x))
    # A gradient takes the long way.
    (grad,) = torch.autograd.grad(block(x.requires_grad_()).sum(), x)
    (expected,) = torch.autograd.grad(block.train().eval()(x).sum(), x)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize(
    "move",
    [
        lambda block: block.to("cpu"),
        lambda block: block.half().double(),
        lambda block: block.to(torch.float32),
        lambda block: block.to(memory_format=torch.channels_last),
        lambda block: block._apply(torch.clone),  # to another address, as another device is
        copy.deepcopy,
        lambda block: pickle.loads(pickle.dumps(block)),
        lambda block: copy.deepcopy(torch.nn.Sequential(block).float())[0].double(),
    ],
    ids=["nowhere", "there and back", "dtype", "layout", "device", "copy", "pickle", "in another"],
)
def test_a_frozen_block_stays_so_wherever_it_moves(move: Callable[..., InpaintBlock]) -> None:
    block = InpaintBlock(16, 6, 4, 16, 3).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    block.freeze()
    moved = move(block)
    calls: list[Tensor | None] = []
    look_up = moved.memory.look_up
    moved.memory.look_up = lambda query, values=None: calls.append(values) or look_up(query, values)
    x = torch.randn(8, 16, 2, 2).to(moved.memory.slots.dtype)
    with torch.no_grad():
        frozen = moved(x)
        assert calls.pop() is moved.projected is not None
        assert_close(frozen, moved.train().eval()(x))  # projected from the slots that it has now
        moved.freeze()
        moved.memory.slots.mul_(1.5)
        calls.clear()
        changed = moved(x)
        assert calls.pop() is None
        assert torch.equal(changed, moved.train().eval()(x))
    assert moved is block or block.projected is not None


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_frozen_block_has_the_projections_of_its_weights(
    twin_of: Callable[[InpaintBlock], InpaintBlock],
) -> None:
    block = InpaintBlock(16, 6, 4, 16, 3).eval()
    block.freeze()
    assert torch.equal(twin_of(block).projected, block.projected)
    with torch.no_grad():
        block.memory.slots.mul_(1.5)
    twin = twin_of(block)
    expected = twin.projected.clone()
    twin.freeze()
    assert torch.equal(twin.projected, expected)
    assert torch.equal(twin.projected[..., :16], block.memory.slots)


def test_a_block_that_is_not_frozen_moves_as_before() -> None:
    block = InpaintBlock(16, 6, 4, 16, 3).eval()
    assert block.half().float().projected is None
    assert copy.deepcopy(block).projected is None


def test_block_reconstructs_a_patch_from_its_neighbours_memories() -> None:
    block = InpaintBlock(8, 6, 16, 8, 3).double().eval()
    f = torch.randn(1, 16, 8, dtype=torch.float64)
    before = block.inpaint(f)
    block.memory.slots[5] += 1.0
    changed = (block.inpaint(f) != before).any(dim=-1)[0]
    # Patch 5 itself changes through the residual of its own answer.
    assert set(changed.nonzero().flatten().tolist()) == {0, 1, 2, 4, 5, 6, 8, 9, 10}


# --- state dicts, copies --------------------------------------------------------------------------


@configs
def test_state_dicts_go_both_ways(name: str) -> None:
    model, plain = pair(name)
    assert list(model.state_dict()) == list(plain.state_dict())
    fresh = SQUID(**model.config).double()
    fresh.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fresh.state_dict(), strict=True)
    images = images_for(model)
    expected = model.eval()(images)["recon"]
    assert torch.equal(fresh.eval()(images)["recon"], expected)


def test_checkpoint_without_pickled_code() -> None:
    model, file = SQUID(**BASE).train(), io.BytesIO()
    model(images_for(model))
    update_queues(model)
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = SQUID(**model.config)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert int(other.inpaint_block.memory.ptr) == 3
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    images = images_for(model)
    for each in (model, other.train()):  # the next features go to the next slots
        each(images)
        update_queues(each)
    assert torch.equal(other.inpaint_block.memory.slots, model.inpaint_block.memory.slots)


def test_deepcopy_is_equal_and_independent() -> None:
    model, _ = pair("windows of the image and of patches")
    twin, images = copy.deepcopy(model), images_for(model)
    expected = model.eval()(images)["recon"]
    assert torch.equal(twin.eval()(images)["recon"], expected)
    twin.train()(images)
    twin.inpaint_block.memory.update()
    assert int(model.inpaint_block.memory.ptr) == 0
    assert torch.equal(model(images)["recon"], expected)


def filled() -> tuple[SQUID, Tensor, Tensor]:
    """A model with two queued batches, images, and their reconstructions."""
    model = SQUID(**BASE | CONFIGS["windows of the image and of patches"])
    images = images_for(model).float()
    for _ in range(2):
        model.train()(images)
        update_queues(model)
    return model, images, model.eval()(images)["recon"].detach()


def assert_same_model(model: SQUID, source: SQUID, images: Tensor, recon: Tensor) -> None:
    assert torch.equal(model.eval()(images)["recon"], recon)
    assert int(model.inpaint_block.memory.ptr) == int(source.inpaint_block.memory.ptr) == 6
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_a_model_without_data_gets_all_of_it_from_a_state_dict() -> None:
    source, images, recon = filled()
    with torch.device("meta"):
        assigned, emptied = SQUID(**source.config), SQUID(**source.config)
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert_same_model(assigned, source, images, recon)
    emptied.to_empty(device="cpu")
    for buffer in emptied.buffers():  # what memory without data may hold
        buffer.fill_(77)
    emptied.load_state_dict(source.state_dict())
    assert_same_model(emptied, source, images, recon)


def test_a_model_without_data_can_be_drawn_anew() -> None:
    with torch.device("meta"):
        model = SQUID(**BASE)
    model.to_empty(device="cpu")
    for buffer in model.inpaint_block.memory.buffers():
        buffer.fill_(77)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = SQUID(**BASE)
    assert torch.equal(model.inpaint_block.code, fresh.inpaint_block.code)
    queue = model.inpaint_block.memory
    assert int(queue.ptr) == 0
    assert 0.24 < float(queue.slots.abs().max()) <= 0.25  # 1 / sqrt(16 channels)
    assert model(images_for(model).float())["recon"].isfinite().all()


def test_safetensors_saves_and_loads_a_model(tmp_path: Path) -> None:
    source, images, recon = filled()
    save_model(source, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(source.state_dict())
        assert not file.metadata() or "format" in file.metadata()  # nothing left out as a copy
    twin = SQUID(**source.config)
    assert load_model(twin, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(twin.eval()(images)["recon"], recon)


@pytest.mark.parametrize("memory", [MemoryQueue, MemoryMatrix])
def test_a_state_dict_is_a_view_of_the_memories(memory: type) -> None:
    slots = memory(5, 3, 2, 4)
    before = slots.slots._version
    state = slots.state_dict()
    assert slots.slots._version == before  # nothing has been written
    for i, value in enumerate(state.values()):
        assert value.untyped_storage().nbytes() == 5 * 3 * 4
        value.fill_(i)
    assert slots.slots[:, 4, 2].tolist() == [0, 1, 2, 3]
    assert slots.slots._version > before  # which autograd has to know


def test_a_parametrised_memory_has_the_state_dict_of_pytorch() -> None:
    memory, twin = (MemoryMatrix(5, 3, 2, 4) for _ in range(2))
    for each in (memory, twin):
        nn.utils.parametrize.register_parametrization(each, "slots", nn.Tanh(), unsafe=True)
    assert list(memory.state_dict()) == ["parametrizations.slots.original"]
    twin.load_state_dict(memory.state_dict())
    assert torch.equal(twin.slots, memory.slots)


# --- layouts, precision, compilation --------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["nine patches, two channels", "memories of patches"])
def test_channels_last_equals_contiguous(name: str, training: bool) -> None:
    model, plain = pair(name)
    images = images_for(model)
    expected = plain.train(training)(images)
    last = model.to(memory_format=torch.channels_last).train(training)
    outputs = last(images.to(memory_format=torch.channels_last))
    for key in ("recon", "patch", "embedding", "teacher_recon"):
        assert_close(outputs[key], expected[key], EXACT)
    loss_of(outputs, images, 0.0).backward()
    loss_of(expected, images, 0.0).backward()
    assert_same_gradients(gradients(model), gradients(plain), EXACT)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast_stays_close(training: bool) -> None:
    # Raw dot products: what a shrinkage selects may change with a rounding, and rightly so.
    model, _ = pair("no shrinkage")
    model.float().train(training)
    images = images_for(model)
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = {key: value.float() for key, value in model(images).items()}
        model.zero_grad()
        loss_of(outputs, images, 0.1).backward()
        outputs = {key: value.detach() for key, value in outputs.items()}
        runs.append((outputs, torch.cat([g.flatten() for g in gradients(model).values()])))
    (expected, exact), (outputs, rough) = runs
    assert error(outputs["recon"], expected["recon"]) < 0.1
    assert error(outputs["teacher_recon"], expected["teacher_recon"]) < 0.1
    difference = outputs["embedding"] - expected["embedding"]
    assert difference.square().mean().sqrt() < 0.05 * expected["embedding"].std()
    assert error(outputs["dist_loss"], expected["dist_loss"]) < 0.05
    assert F.cosine_similarity(rough, exact, dim=0) > 0.97


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiled_equals_eager(training: bool) -> None:
    torch.compiler.reset()
    model, _ = pair("windows of the image and of patches")
    model.float().train(training)
    other, images = copy.deepcopy(model), images_for(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(images), model(images)
    for key, value in expected.items():
        assert_close(outputs[key], value, 1e-6)
    if training:
        loss_of(outputs, images, 0.1).backward()
        loss_of(expected, images, 0.1).backward()
        assert_same_gradients(gradients(other), gradients(model), 1e-5)
        update_queues(model, other)
        queue, twin = model.inpaint_block.memory, other.inpaint_block.memory
        assert_close(twin.slots, queue.slots, 1e-6)
        assert int(twin.ptr) == 3


# --- presets --------------------------------------------------------------------------------------

SIZES = {"zhanglab": 128, "chexpert": 128, "digit_anatomy": 96}


def published_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes by published name; ``state_dict`` cannot be asked of a model without data."""
    values = dict((*model.named_parameters(), *model.named_buffers()))
    return {
        name: value.shape
        for name, value in published(model, values).items()
        if not name.endswith((".ptr", ".code"))
    }


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str) -> None:
    with torch.device("meta"):
        model = SQUID.from_preset(name)
        plain = reference.SQUID(**PRESETS[name].model)
    assert model.image_size == PRESETS[name].image_size == SIZES.get(name, model.image_size)
    assert published_shapes(model) == published_shapes(plain)
    assert model.config == PRESETS[name].model


def test_published_settings() -> None:
    radiographs = {
        "num_patch": 2, "level": 4, "features_root": 32, "num_slots": 200, "mem_num_slots": 200,
        "shrink_thres": 5, "memory_channel": 2048, "initial_combine": 2, "ratio": 0.95,
        "decoder_memory": [None, None, memory(V1, 64, 4), memory(V1, 16, 4)],
    }  # fmt: skip
    for name in ("zhanglab", "chexpert"):
        model, recipe = PRESETS[name].model, PRESETS[name].recipe
        assert model == model | radiographs
        assert (recipe.recon_w, recipe.g_w, recipe.t_w) == (10, 0.005, 0.01)
        assert (recipe.dist_w, recipe.d_w, recipe.n_critic) == (0.001, 0.005, 2)
    digit = PRESETS["digit_anatomy"]
    assert (digit.model["num_patch"], digit.model["level"]) == (3, 3)
    assert digit.model["decoder_memory"] == [None, memory(V3, 256, 9), memory(V3, 64, 9)]
    assert digit.model["ops"] == ["concat", "concat", "none"]
    assert (digit.recipe.recon_w, digit.recipe.n_critic) == (1, 1)
    floors = {name: PRESETS[name].recipe.lr_floor for name in SIZES}
    assert floors == {"zhanglab": 0.1, "chexpert": 0.5, "digit_anatomy": 0.01}


def test_preset_with_an_override() -> None:
    with torch.device("meta"):
        model = SQUID.from_preset("zhanglab", dist=False, num_slots=50)
    assert not hasattr(model, "teacher_ups")
    assert model.inpaint_block.memory.slots.shape == (4, 50, 2048)
    assert PRESETS["zhanglab"].model["num_slots"] == 200


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"preset is 'zhang'; known are zhanglab, zhanglab_cpu, "):
        SQUID.from_preset("zhang")


# --- errors ---------------------------------------------------------------------------------------

CONFIG_ERRORS: dict[str, dict[str, Any]] = {
    "level is 6; it must lie between 1 and 5.": {"level": 6},
    "num_patch is 0; it must be at least 1.": {"num_patch": 0},
    "features_root is 1; the bottleneck is a quarter of the deepest width 2": (
        {"features_root": 1, "level": 1, "ops": ["none"]}
    ),
    "initial_combine is 3; it must lie between 1 and level=2, or be None.": {"initial_combine": 3},
    "initial_combine is 0;": {"initial_combine": 0},
    "ratio is 1.5; it must lie in [0, 1].": {"ratio": 1.5},
    "ops is ['none']; it must have level=2 entries": {"ops": ["none"]},
    "ops is ['none', 'add']": {"ops": ["none", "add"]},
    "memory_channel is 17; it must be 4 (a quarter of width 16) times the pixels of a patch's "
    "deepest map, one of [4, 16, 36, 64, 100, 144, 196, 256]": {"memory_channel": 17},
    "memory_channel is 2;": {"memory_channel": 2},
    "memory_channel is 36; the attention's 8 heads": {"memory_channel": 36},
    "shrink_thres is -1;": {"shrink_thres": -1},
    "shrink_thres is 10, but a memory has only 9": {"shrink_thres": 10},
    "decoder_memory has 1 entries; it must have level=2.": {"decoder_memory": [None]},
    "decoder_memory[1] has type 'V2'; known are ['MemoryMatrixBlock'": (
        {"decoder_memory": [None, memory("V2", 4, 4)]}
    ),
    "decoder_memory[0] lacks ['multiplier'].": (
        {"decoder_memory": [{"type": V1, "num_memory": 4}, None]}
    ),
    "decoder_memory[1] has multiplier=5; its memories hold 4 pixels of a map of 4 x 4, so "
    "multiplier=4 would fit.": {"decoder_memory": [None, memory(V1, 5, 4)]},
    "decoder_memory[1] has num_memory=9; it must be a square number whose root divides the map's "
    "side of 4 pixels.": {"decoder_memory": [None, memory(V1, 4, 9)]},
    "decoder_memory[0] is a MemoryMatrixBlockV3, which needs patches": (
        {"initial_combine": 1, "decoder_memory": [memory(V3, 64, 4), None]}
    ),
    "decoder_memory[1] has num_memory=9; a MemoryMatrixBlockV3 needs one for each of the 4": (
        {"decoder_memory": [None, memory(V3, 16, 9)]}
    ),
}


@pytest.mark.parametrize("sentence", CONFIG_ERRORS)
def test_constructor_errors(sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        SQUID(**BASE | CONFIG_ERRORS[sentence])


def of_values(*values: float) -> Tensor:
    """Grey images, one of each value."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)


IMAGE_ERRORS: dict[str, Tensor] = {
    "images are [2, 3, 16, 16]; this model takes [B, 1, 16": torch.zeros(2, 3, 16, 16),
    "images are [16, 16];": torch.zeros(16, 16),
    "images are 32 x 16; with num_patch=2, level=2 and memory_channel=16 they must be 16 x 16.": (
        torch.zeros(2, 1, 32, 16)
    ),
    "images are torch.uint8; floating-point values in [0, 1] fit.": (
        torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    ),
    "1 of 3 images hold NaN or infinite values": (
        torch.tensor([0.0, torch.nan, 1.0]).view(3, 1, 1, 1).expand(3, 1, 16, 16)
    ),
    "2 of 2 images hold NaN or infinite": torch.full((2, 1, 16, 16), torch.inf),
    "1 of 3 images hold values outside [0, 1]: the smallest is 0, the greatest is 255; divide by "
    "255, or": of_values(0.0, 1.0, 255.0),
    "1 of 2 images hold values outside [0, 1]: the smallest is 0, the greatest is 4095; divide by "
    "the greatest value": of_values(0.0, 4095.0),
    "2 of 2 images hold values outside [0, 1]: the smallest is -1024, the greatest is 3071; map "
    "Hounsfield": of_values(-1024.0, 3071.0),
    "2 of 3 images hold values outside [0, 1]: the smallest is -1, the greatest is 1; if they were "
    "scaled to [-1, 1]": of_values(-1.0, 1.0, -0.5),
    "the smallest is -2.1, the greatest is 2.6; if they were normalised": of_values(-2.1, 2.6),
    "the smallest is -0.06, the greatest is 1.04; if a bicubic": of_values(-0.06, 0.5, 1.04),
    "[0, 1]: the smallest is 1.002, the greatest is 1.002; if a": of_values(1.002),
    "1 of 1 images hold values outside [0, 1]: the smallest is -0.0011": of_values(-0.0011),
}


@pytest.mark.parametrize("sentence", IMAGE_ERRORS)
def test_call_errors(sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        SQUID(**BASE)(IMAGE_ERRORS[sentence])


NO_IMAGES: dict[str, object] = {
    "images are of the type ndarray; a tensor of floating-point values in [0, 1] fits.": (
        np.zeros((2, 1, 16, 16), np.float32)
    ),
    "images are of the type list;": [torch.zeros(1, 16, 16)],
    "images are of the type str;": "a.png",
    "images are of the type NoneType;": None,
    "images are a sparse or nested tensor; a dense one would fit.": (
        torch.zeros(2, 1, 16, 16).to_sparse()
    ),
    "images are torch.float8_e5m2; floating-point": torch.zeros(2, 1, 16, 16).to(torch.float8_e5m2),
    "images are torch.bool; floating-point": torch.zeros(2, 1, 16, 16, dtype=torch.bool),
    "images are torch.complex64; floating-point": torch.zeros(2, 1, 16, 16, dtype=torch.complex64),
    "images are torch.float64 and the weights torch.float32; images.to(torch.float32) would": (
        torch.zeros(2, 1, 16, 16, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("sentence", NO_IMAGES)
def test_what_is_no_image_is_named(sentence: str) -> None:
    given = NO_IMAGES[sentence]
    for call in (SQUID(**BASE), SQUID(**BASE).eval(), SQUID(**BASE).encode):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call(given)
    discriminator = Discriminator(1)
    for call in (discriminator, discriminator.eval(), partial(discriminator.score, mode="running")):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call(given)


def test_the_encoder_alone_takes_no_other_range_either() -> None:
    with pytest.raises(ValueError, match=r"the greatest is 255; divide by 255"):
        SQUID(**BASE).encode(of_values(0.0, 255.0))


def test_autocast_casts_images_and_weights_itself() -> None:
    model, images = SQUID(**BASE).eval(), torch.rand(2, 1, 16, 16)
    expected = model(images)["recon"]
    with torch.autocast("cpu", torch.bfloat16):
        for given in (images, images.bfloat16()):
            torch.testing.assert_close(model(given)["recon"].float(), expected, atol=2e-2, rtol=0)


def test_values_are_checked_under_vmap() -> None:
    discriminator, images = Discriminator(2).eval(), torch.rand(3, 1, 1, 48, 48)
    score = torch.func.vmap(discriminator.score)
    expected = discriminator.score(images[:, 0])
    torch.testing.assert_close(score(images)[:, 0], expected)
    with pytest.raises(ValueError, match=r"divide by 255"):
        score(images * 255)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_is_no_other_range(dtype: torch.dtype) -> None:
    above = math.nextafter(1, 2) if dtype == torch.float64 else 1 + torch.finfo(torch.float16).eps
    check_values(of_values(-0.0009, 0.0, above).to(dtype))
    check_values(torch.ones(2, 1, 4, 4, dtype=dtype))
    with pytest.raises(ValueError, match=r"^1 of 2 .* the greatest is 255"):
        check_values(of_values(1.0, 255.0).to(dtype))


def test_no_images_give_no_reconstructions() -> None:
    outputs = SQUID(**BASE).eval()(torch.zeros(0, 1, 16, 16), teacher=False)
    assert outputs["recon"].shape == (0, 1, 16, 16)
    assert outputs["patch"].shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("shrink_thres", "said"), [(5, "Gumbel shrinkage, top 5"), (0.02, "hard shrinkage"), (0, "raw")]
)
def test_the_kind_of_shrinkage_is_said(
    caplog: pytest.LogCaptureFixture, shrink_thres: float, said: str
) -> None:
    with caplog.at_level("INFO", "squid_fast"):
        SQUID.from_preset("small", shrink_thres=shrink_thres)
    assert said in caplog.text
