"""Memory queues, memory matrices and the decoder blocks that hold matrices."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import squid_fast
from squid_fast import MemoryMatrix, MemoryQueue, reference
from squid_fast.modules.memory import BLOCKS, describe_shrinkage
from squid_fast.reference.memory import BLOCKS as REFERENCE_BLOCKS
from tests.factories import image_batch, tiny_squid
from tests.tolerances import assert_close


def feed(queue: nn.Module, features: Tensor) -> None:
    queue.train()
    queue(features)
    queue.update()


# --- queue ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MemoryQueue, MemoryMatrix])
def test_slots_begin_uniform(kind: type) -> None:
    slots = kind(300, 16, 5, 4).slots.detach()
    assert slots.abs().max() <= 0.25  # 1 / sqrt(16)
    # Of 19200 draws: extremes, mean and variance of a uniform distribution.
    assert slots.abs().max() > 0.2499
    assert abs(slots.mean().item()) < 4.5 * 0.25 / 3**0.5 / 19200**0.5
    assert slots.var().item() == pytest.approx(0.25**2 / 3, rel=0.05)


@pytest.mark.parametrize("batches", [[3, 3, 4, 2, 7, 10, 1], [10, 10], [25], [4, 23, 11, 30, 1]])
def test_queue_is_a_ring(batches: list[int]) -> None:
    N, M, C = 3, 10, 4
    queue = MemoryQueue(M, C, 5, N)
    ring, position = queue.slots.clone(), 0
    for B in batches:
        features = torch.randn(B, N, C)
        feed(queue, features)
        for feature in features:
            ring[:, position] = feature
            position = (position + 1) % M
        assert torch.equal(queue.slots, ring)
        assert int(queue.ptr) == position


def test_second_update_does_nothing() -> None:
    queue = MemoryQueue(6, 2, 2, 3)
    feed(queue, torch.randn(4, 3, 2))
    slots = queue.slots.clone()
    queue.update()
    assert torch.equal(queue.slots, slots)
    assert int(queue.ptr) == 4


@pytest.mark.parametrize("forward", [False, True], ids=["no forward", "evaluation"])
def test_update_without_a_training_forward_does_nothing(forward: bool) -> None:
    queue = MemoryQueue(6, 2, 2, 3).eval()
    slots = queue.slots.clone()
    if forward:
        queue(torch.randn(4, 3, 2))
    queue.update()
    assert torch.equal(queue.slots, slots)
    assert int(queue.ptr) == 0


def test_update_takes_the_last_forward() -> None:
    queue = MemoryQueue(8, 2, 2, 3)
    first, last = torch.randn(4, 3, 2), torch.randn(2, 3, 2)
    queue(first)
    feed(queue, last)
    assert torch.equal(queue.slots[:, :2], last.transpose(0, 1))
    assert int(queue.ptr) == 2


def test_queue_answers_with_its_slots_before_the_update_and_takes_no_gradient() -> None:
    queue = MemoryQueue(8, 4, 3, 2).double()
    query = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    expected = reference.memory_lookup(query, queue.slots.clone(), 3)
    answer = queue(query)
    assert_close(answer, expected)
    answer.sum().backward()
    assert query.grad is not None
    assert query.grad.abs().max() > 0
    assert not queue.slots.requires_grad
    assert list(queue.parameters()) == []
    queue.update()
    assert torch.equal(queue.slots[:, :5], query.detach().transpose(0, 1))
    assert not queue.slots.requires_grad


def test_queue_stores_features_of_another_dtype() -> None:
    queue = MemoryQueue(4, 2, 2, 1)
    features = torch.randn(3, 1, 2).bfloat16()
    feed(queue, features)
    assert queue.slots.dtype == torch.float32
    assert torch.equal(queue.slots[0, :3], features[:, 0].float())


def test_training_loops_of_the_published_code_find_every_queue() -> None:
    model = tiny_squid().train()
    images = image_batch(3)
    model(images)
    block = model.inpaint_block
    with torch.no_grad():
        narrow = block.bottleneck_conv1.train()(model.encode(images)[0])
    before = block.memory.slots.clone()
    for module in model.modules():
        if isinstance(module, MemoryQueue):
            module.update()
    after = block.memory.slots
    assert_close(after[:, :3], narrow.view(3, 4, -1).transpose(0, 1))
    assert torch.equal(after[:, 3:], before[:, 3:])


# --- state dicts ----------------------------------------------------------------------------------


def test_state_dict_is_that_of_the_published_list_of_memories() -> None:
    holder = nn.ModuleDict({"memory": MemoryQueue(5, 3, 2, 4)})
    published = nn.ModuleDict(
        {"memory": nn.ModuleList(reference.MemoryQueue(5, 3, 2) for _ in range(4))}
    )
    assert list(holder.state_dict()) == list(published.state_dict())
    holder.load_state_dict(published.state_dict(), strict=True)
    for i, queue in enumerate(published["memory"]):
        assert torch.equal(holder["memory"].slots[i], queue.memMatrix)
    published.load_state_dict(holder.state_dict(), strict=True)


@pytest.mark.parametrize("ptr", [torch.tensor(4), torch.tensor([4]), torch.tensor([11])], ids=str)
def test_ptr_may_be_an_entry(ptr: Tensor) -> None:
    # Safetensors keeps tensors only, of which the metadata is none.
    queue = nn.ModuleDict({"memory": MemoryQueue(7, 3, 2, 4)})
    state = dict(queue.state_dict()) | {"memory.ptr": ptr}
    queue.load_state_dict(state, strict=True)
    assert int(queue["memory"].ptr) == 4


def test_published_state_dict_begins_the_ring_anew() -> None:
    queue = MemoryQueue(7, 3, 2, 4)
    published = dict(queue.state_dict())
    feed(queue, torch.randn(5, 4, 3))
    queue.load_state_dict(published, strict=True)
    assert int(queue.ptr) == 0


def test_single_memory_has_the_published_key() -> None:
    for kind in (MemoryQueue, MemoryMatrix):
        single = kind(5, 3, 2)
        assert list(single.state_dict()) == ["memMatrix"]
        values = torch.randn(5, 3)
        single.load_state_dict({"memMatrix": values}, strict=True)
        assert torch.equal(single.slots[0], values)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("memory.2.memMatrix", None, r"Missing key.*memory\.2\.memMatrix"),
        ("memory.4.memMatrix", torch.zeros(5, 3), r"Unexpected key.*memory\.4\.memMatrix"),
        (
            "memory.1.memMatrix",
            torch.zeros(6, 3),
            r"1\.memMatrix is \[6, 3\], the model's is \[5, 3\]",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
@pytest.mark.parametrize("kind", [MemoryQueue, MemoryMatrix])
def test_wrong_state_dict(kind: type, key: str, value: Tensor | None, sentence: str) -> None:
    holder = nn.ModuleDict({"memory": kind(5, 3, 2, 4)})
    before = holder["memory"].slots.detach().clone()
    state = {k: v for k, v in (holder.state_dict() | {key: value}).items() if v is not None}
    with pytest.raises(RuntimeError, match=r"(?s)" + sentence):
        holder.load_state_dict(state, strict=True)
    assert torch.equal(holder["memory"].slots.detach(), before)


# --- shrinkage by the type of the argument --------------------------------------------------------


@pytest.mark.parametrize("shrink_thres", [1, 3, 8, 0.05, 0.5, 0.99, 0, 0.0], ids=repr)
@pytest.mark.parametrize("kind", ["MemoryQueue", "MemoryMatrix"])
def test_lookup_equals_reference(kind: str, shrink_thres: float) -> None:
    memory = getattr(squid_fast, kind)(8, 5, shrink_thres, 3).double()
    query = torch.randn(4, 3, 5, dtype=torch.float64)
    answer = memory(query)
    for n in range(3):
        plain = getattr(reference, kind)(8, 5, shrink_thres).double()
        plain.load_state_dict({"memMatrix": memory.slots[n].detach()})
        assert_close(answer[:, n], plain(query[:, n]), floor=1.0)


def test_five_and_five_point_zero_are_different_methods() -> None:
    gumbel = MemoryMatrix(9, 4, 5)
    with pytest.warns(UserWarning, match=r"shrink_thres is 5\.0, a float, which chooses hard"):
        hard = MemoryMatrix(9, 4, 5.0)
    hard.load_state_dict(gumbel.state_dict())
    query = torch.randn(3, 4)
    assert gumbel(query).abs().max() > 0
    assert hard(query).abs().max() == 0  # no dot product exceeds 5
    assert "Gumbel shrinkage, top 5 (which keeps 4 slots)" in repr(gumbel)
    assert "hard shrinkage, threshold 5.0 (give an int for Gumbel shrinkage)" in repr(hard)
    assert describe_shrinkage(0) == "no shrinkage: raw dot products are the weights"


@pytest.mark.parametrize(
    ("shrink_thres", "sentence"),
    [
        (-1, "shrink_thres is -1; it must be 0, an int k > 0"),
        (-0.5, "shrink_thres is -0.5"),
        (True, "shrink_thres is True"),
        (float("nan"), "shrink_thres is nan"),
        (float("inf"), "shrink_thres is inf"),
        (9, "shrink_thres is 9, but a memory has only 8 slots"),
    ],
)
def test_errors_of_shrink_thres(shrink_thres: float, sentence: str) -> None:
    for kind in (MemoryQueue, MemoryMatrix):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            kind(8, 4, shrink_thres, 2)


# --- decoder blocks -------------------------------------------------------------------------------


def gradients(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Result and gradients of input and of all slots, one memory after the other."""
    x = x.detach().requires_grad_()
    parameters = list(module.parameters())
    result = module(x)
    grad_x, *grads = torch.autograd.grad(result, [x, *parameters], grad)
    return result.detach(), grad_x, torch.cat([g.reshape(-1, g.shape[-1]) for g in grads])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shrink_thres", [3, 0.4, 0], ids=repr)
@pytest.mark.parametrize(
    ("name", "num_memory", "shape", "slot_dim"),
    [
        ("MemoryMatrixBlock", 4, (3, 3, 6, 4), 18),  # windows of 3 x 2 pixels
        ("MemoryMatrixBlock", 9, (2, 2, 3, 6), 4),  # of 1 x 2
        ("MemoryMatrixBlock", 1, (5, 1, 2, 2), 4),
        ("MemoryMatrixBlockV3", 4, (8, 3, 2, 3), 18),
        ("MemoryMatrixBlockV3", 9, (9, 5, 1, 1), 5),
        ("MemoryMatrixBlockV4", 4, (3, 3, 4, 2), 24),
        ("MemoryMatrixBlockV4", 1, (2, 2, 3, 1), 6),
    ],
)
def test_block_equals_reference(
    name: str,
    num_memory: int,
    shape: tuple[int, ...],
    slot_dim: int,
    shrink_thres: float,
    training: bool,
    layout: torch.memory_format,
) -> None:
    # No two pixels, channels or windows are alike, so each wrong order shows.
    arguments = (7, slot_dim, num_memory, shrink_thres, 1.0)
    block = BLOCKS[name](*arguments).double().train(training)
    plain = REFERENCE_BLOCKS[name](*arguments).double().train(training)
    plain.load_state_dict(block.state_dict(), strict=True)
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    expected = gradients(plain, x, grad)
    actual = gradients(block, x.to(memory_format=layout), grad)
    for got, value in zip(actual, expected, strict=True):
        assert_close(got, value, floor=1.0)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_training_keeps_maps_in_channels_last(name: str) -> None:
    # Else every convolution behind the block would copy its input, on a GPU.
    width = 8 if name == "MemoryMatrixBlock" else 32  # windows of 2 x 2, or a whole map
    block = BLOCKS[name](7, width, 4).train()
    x = torch.rand(4, 2, 4, 4).to(memory_format=torch.channels_last)
    assert block(x).is_contiguous(memory_format=torch.channels_last)


def test_blocks_mix_with_their_input_in_training_only() -> None:
    for name in BLOCKS:
        block = BLOCKS[name](6, 3 * (256 if name == "MemoryMatrixBlock" else 1024), 4, 3)
        assert block.mask_ratio == 0.95
        x = torch.randn(4, 3, 32, 32)
        answer = block.eval()(x).detach()
        out = block.train()(x).detach()
        kept = (out == answer).all(dim=1)
        assert torch.equal(torch.where(kept[:, None], answer, x), out), name
        assert abs(kept.double().mean().item() - 0.95) < 4.5 * (0.95 * 0.05 / 4096) ** 0.5, name
        block.mask_ratio = 0.0
        assert torch.equal(block(x), x)


def test_a_model_without_storage_has_a_state_dict() -> None:
    with torch.device("meta"):
        queue = MemoryQueue(5, 4, 3, 2)
    assert list(queue.state_dict()) == ["0.memMatrix", "1.memMatrix"]
