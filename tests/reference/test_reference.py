"""The reference against hand-made numbers, PyTorch's own modules and the formulas spelt out."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from squid_fast import reference
from squid_fast.reference.attention import NEIGHBOURS
from squid_fast.reference.blocks import DoubleConv, to_image, to_patches
from squid_fast.reference.memory import MemoryMatrixBlock, MemoryMatrixBlockV3, MemoryMatrixBlockV4
from tests.tolerances import assert_close


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- shrinkage and lookup -------------------------------------------------------------------------


def test_gumbel_shrinkage_by_hand() -> None:
    logits = doubles(1, 2, 3, 4, 5).log()  # softmax: fifteenths
    assert_close(reference.gumbel_shrinkage(logits, 3), doubles(0, 0, 0, 4, 5) / 9)
    assert_close(reference.gumbel_shrinkage(logits, 5), doubles(0, 2, 3, 4, 5) / 14)
    assert torch.equal(reference.gumbel_shrinkage(logits, 1), torch.zeros(5).double())


def test_ties_at_the_threshold_all_go() -> None:
    logits = doubles(1, 3, 3, 3, 6).log()
    for k in (2, 3, 4):
        assert_close(reference.gumbel_shrinkage(logits, k), doubles(0, 0, 0, 0, 1))
    assert_close(reference.gumbel_shrinkage(logits, 5), doubles(0, 3, 3, 3, 6) / 15)


def test_near_ties_are_damped_by_the_published_epsilon() -> None:
    # The runner-up lies d = 1e-12 above the threshold: kept with d / (d + 1e-12), one half.
    p = doubles(0.5, 0.25 + 1e-12, 0.25)
    weights = reference.gumbel_shrinkage(p.log(), 3)
    assert weights[1].item() == pytest.approx(0.125 / 0.625, rel=1e-3)


def test_gumbel_gradient_passes_straight_through() -> None:
    logits, shrink = torch.randn(6).double(), partial(reference.gumbel_shrinkage, top_k=3)
    jacobian = torch.autograd.functional.jacobian(shrink, logits)
    p = torch.softmax(logits, dim=0)
    assert_close(jacobian, p.diag() - p[:, None] * p)


def test_hard_shrinkage_by_hand() -> None:
    logits = doubles(0.5, 1.0, 1.5, 2.5, -4)
    assert_close(reference.hard_shrinkage(logits, 1.0), doubles(0, 0, 1.5, 2.5, 0) / 4)
    assert torch.equal(reference.hard_shrinkage(logits, 3.0), torch.zeros(5).double())


def test_hard_shrinkage_gradcheck() -> None:
    logits = doubles(0.5, 1.1, 1.5, 2.5, -4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.hard_shrinkage(x, 1.0), logits, atol=1e-7)


def test_lookup_by_hand() -> None:
    memory = torch.eye(3, dtype=torch.float64)[None] * doubles(1, 2, 4).view(3, 1)
    query = doubles(3, 1, 1).log().view(1, 1, 3)  # scores log 3, 0, 0
    assert_close(reference.memory_lookup(query, memory, 2), doubles(1, 0, 0).view(1, 1, 3))
    raw = reference.memory_lookup(query, memory)
    assert_close(raw, doubles(math.log(3), 0, 0).view(1, 1, 3))
    hard = reference.memory_lookup(doubles(3, 1, 0.1).view(1, 1, 3), memory, threshold=1.0)
    assert_close(hard, doubles(3, 2 * 2, 0).view(1, 1, 3) / 5)


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("P", [1, 2, 3])
def test_attention_is_multi_head_attention_over_a_padded_window(P: int) -> None:
    C, heads, B = 8, 4, 2
    module = nn.MultiheadAttention(C, heads, batch_first=True).double()
    with torch.no_grad():
        module.in_proj_bias.normal_()
    query, memory = torch.randn(2, B, P * P, C, dtype=torch.float64)
    # The published way: neighbours by unfolding a zero-padded map, then PyTorch's module.
    grid = F.pad(memory.transpose(1, 2).view(B, C, P, P), (1, 1, 1, 1))
    windows = F.unfold(grid, 3).view(B, C, 9, P * P).permute(0, 3, 2, 1)
    windows = torch.cat([windows[:, :, :4], windows[:, :, 5:]], dim=2).reshape(-1, 8, C)
    expected, _ = module(query.reshape(-1, 1, C), windows, windows)

    w, b = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, memory, memory), w, b, strict=True))
    attended = reference.neighbourhood_attention(q, k, v, b[1], b[2], heads)
    assert_close(module.out_proj(attended), expected.view(B, P * P, C))


def test_neighbours_are_the_eight_around() -> None:
    around = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
    assert sorted(NEIGHBOURS) == around


# --- memories -------------------------------------------------------------------------------------


def test_queue_is_a_ring() -> None:
    queue = reference.MemoryQueue(4, 1, 2).train()
    for batch, expected in [
        ([1.0, 2.0, 3.0], [1, 2, 3]),
        ([4.0, 5.0], [5, 2, 3, 4]),
        ([6.0, 7.0, 8.0, 9.0, 10.0, 11.0], [9, 10, 11, 8]),
    ]:
        queue(torch.tensor(batch)[:, None])
        queue.update()
        assert queue.memMatrix[: len(expected), 0].tolist() == expected
    assert queue.ptr == 3
    queue.update()
    queue.eval()(torch.zeros(2, 1))
    queue.update()
    assert queue.memMatrix[:, 0].tolist() == [9, 10, 11, 8]


def test_an_int_and_a_float_are_different_methods() -> None:
    assert reference.memory.shrinkage_of(5) == {"top_k": 5}
    assert reference.memory.shrinkage_of(5.0) == {"threshold": 5.0}
    assert reference.memory.shrinkage_of(0) == {}


def test_flattening_order_of_the_blocks() -> None:
    # One slot and raw dot products: answer = <x, slot> * slot, so a slot that is one at a single
    # entry reads that entry out, and puts it back in the same place.
    def probe(block: nn.Module, memory: nn.Module, x: torch.Tensor, entry: int) -> list[int]:
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.zero_()
            memory.memMatrix[0, entry] = 1.0
        answer = block.eval()(x)
        assert torch.equal(answer[answer != 0], x[answer != 0])
        return (answer[0] if answer.shape[0] == 1 else answer).nonzero()[0].tolist()

    B, c, h, w = 1, 2, 4, 6
    x = torch.rand(B, c, h, w) + 1
    block = MemoryMatrixBlock(1, c * 2 * 3, 4, 0)
    for entry in range(12):  # window 2 is the one below left; (row, column, channel)
        row, column, channel = entry // 6, entry // 2 % 3, entry % 2
        assert probe(block, block.memory[2], x, entry) == [channel, 2 + row, column]
    patches = torch.rand(4, c, 2, 3) + 1
    block = MemoryMatrixBlockV3(1, c * 2 * 3, 4, 0)
    for entry in range(12):  # (channel, row, column)
        place = [2, entry // 6, entry // 3 % 2, entry % 3]
        assert probe(block, block.memory[2], patches, entry) == place
    block = MemoryMatrixBlockV4(1, c * h * w, 4, 0)
    for entry in (0, 13, 25, 47):  # windows end to end, each (row, column, channel)
        window, rest = divmod(entry, 12)
        row, column, channel = rest // 6, rest // 2 % 3, rest % 2
        place = [channel, window // 2 * 2 + row, window % 2 * 3 + column]
        assert probe(block, block.memory, x, entry) == place


# --- masked shortcut ------------------------------------------------------------------------------


def test_shortcut_blends_by_the_mask() -> None:
    mask = (torch.rand(2, 1, 4, 4) < 0.5).double()
    a, b = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(reference.masked_shortcut(a, b, 0.5, mask), torch.where(mask == 1, a, b))


def test_shortcut_draws_by_position() -> None:
    ones = torch.ones(4, 3, 64, 64)
    mask = reference.masked_shortcut(ones, 0 * ones, 0.9)
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    assert abs(mask.mean().item() - 0.9) < 4.5 * 0.3 / 128
    assert torch.equal(reference.masked_shortcut(ones, 0 * ones, 1.0), ones)
    assert torch.equal(reference.masked_shortcut(ones, 0 * ones, 0.0), 0 * ones)


# --- network --------------------------------------------------------------------------------------


def test_residual_double_convolution() -> None:
    block = DoubleConv(2, 3, stride=2).double().eval()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    state = block.state_dict()

    def stage(x: torch.Tensor, conv: str, norm: str, stride: int = 1) -> torch.Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], stride, 1)
        return x / math.sqrt(1 + 1e-5)  # fresh statistics

    a = stage(x, "conv1.0", "conv1.1", 2).relu()
    b = stage(stage(a, "conv2.0", "conv2.1").relu(), "conv2.3", "conv2.4")
    assert_close(block(x), (a + b).relu())


def test_patches_are_row_major_and_fastest() -> None:
    x = torch.arange(2 * 36.0).view(2, 1, 6, 6)
    patches = to_patches(x, 3)
    assert patches.shape == (18, 1, 2, 2)
    assert patches[9 + 5, 0].tolist() == x[1, 0, 2:4, 4:6].tolist()
    assert torch.equal(to_image(patches, 3), x)


def test_discriminator_layers() -> None:
    discriminator = reference.Discriminator(2)
    shapes = {k: tuple(v.shape) for k, v in discriminator.named_parameters() if v.dim() > 1}
    assert shapes == {
        "conv_model.0.weight": (16, 1, 5, 5),
        "conv_model.2.weight": (32, 16, 5, 5),
        "conv_model.5.weight": (64, 32, 5, 5),
        "conv_model.8.weight": (128, 64, 5, 5),
        "conv_model.11.weight": (128, 128, 5, 5),
        "regressor.weight": (1, 512),
    }
    assert discriminator.conv_model[1].negative_slope == 0.2


# --- losses and score -----------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    images, teacher = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    recon = teacher / 2
    outputs = {"recon": recon, "teacher_recon": teacher, "dist_loss": torch.tensor(3.0)}
    logits = torch.tensor([[0.0], [math.log(3)]])  # sigmoid 1/2 and 3/4
    bce_real = -(math.log(1 / 2) + math.log(3 / 4)) / 2
    bce_reconstruction = -(math.log(1 / 2) + math.log(1 / 4)) / 2
    loss = reference.generator_loss(images, outputs, logits)
    expected = 10 * 0.25 + 0.005 * bce_real + 0.01 * 1 + 0.001 * 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    alone = outputs | {"teacher_recon": None, "dist_loss": None}
    loss = reference.generator_loss(images, alone, logits, recon_w=1.0, g_w=2.0)
    assert loss.item() == pytest.approx(0.25 + 2 * bce_real, rel=1e-6)
    loss = reference.discriminator_loss(logits, logits)
    assert loss.item() == pytest.approx(0.005 * (bce_real + bce_reconstruction), rel=1e-6)


def test_score_is_one_minus_the_sigmoid() -> None:
    s = torch.linspace(-3, 5, 9, dtype=torch.float64)
    assert_close(reference.z_score(s, 1.0, 2.0), -(s - 1) / 2)
    assert_close(reference.anomaly_score(s, 1.0, 2.0), 1 - torch.sigmoid((s - 1) / 2))


def test_the_z_score_ranks_where_the_anomaly_score_ties() -> None:
    s = torch.tensor([-40.0, -50.0])
    assert reference.anomaly_score(s, 0.0, 1.0).unique().numel() == 1
    assert reference.z_score(s, 0.0, 1.0).tolist() == [40, 50]
