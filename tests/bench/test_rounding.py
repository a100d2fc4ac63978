"""The roundings of a GPU, emulated: by hand, and beside PyTorch's own bf16 on the CPU."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import measurements
from bench.accuracy import rounding, tables
from bench.accuracy.rounding import OTHERS, ROUNDINGS, Emulation, to_bf16, to_tf32
from bench.measurements import Results
from squid_fast import Bundle, Scorer
from squid_fast.inference.scores import PAPER_SCORE
from squid_fast.modules.unet import DoubleConv
from tests.factories import (
    decoder_memory,
    image_batch,
    labelled,
    smooth_image_set,
    trained_discriminator,
    trained_squid,
)
from tests.processor import needs_bf16

CPU = torch.device("cpu")


def of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_bf16_keeps_8_bits_and_rounds_ties_to_even() -> None:
    # Between 1 and 2 lie steps of 2**-7.
    step = 2.0**-7
    given = of(1 + step, 1 + step / 2, 1 + 1.5 * step, 1 + step / 2 + 2.0**-20, -1 - step / 2)
    assert to_bf16(given).tolist() == [1 + step, 1, 1 + 2 * step, 1 + step, -1]


def test_tf32_keeps_11_bits_and_rounds_ties_away_from_zero() -> None:
    step = 2.0**-10
    given = of(1 + step, 1 + step / 2, -1 - step / 2, 1 + 0.49 * step, 2 - step / 2, 3 * 2.0**100)
    nearest = [1 + step, 1 + step, -1 - step, 1, 2, 3 * 2.0**100]
    assert to_tf32(given).tolist() == nearest
    cut = [1 + step, 1, -1, 1, 2 - step, 3 * 2.0**100]
    assert to_tf32(given, cut=True).tolist() == cut


@pytest.mark.parametrize("cut", [False, True])
def test_tf32_leaves_what_has_no_neighbours(cut: bool) -> None:
    found = to_tf32(of(0.0, -0.0, math.inf, -math.inf, math.nan), cut)
    assert found[:4].tolist() == [0.0, 0.0, math.inf, -math.inf]
    assert found[1].signbit()
    assert found[4].isnan()
    quiet = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # all bits set
    assert to_tf32(quiet, cut).isnan().all()
    # A map in channels-last layout keeps its layout.
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert to_tf32(x, cut).stride() == x.stride()


def block_of_whole_numbers() -> tuple[DoubleConv, Tensor]:
    """A block and maps whose sums float32 holds exactly, in whatever order they are summed."""
    block = DoubleConv(16, 16).eval()
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.0  # with mean 0 and variance 1 it only adds its bias
            nn.init.constant_(layer.bias, 0)
        elif isinstance(layer, nn.Conv2d):
            layer.weight.data = torch.randint(-3, 4, layer.weight.shape) / 4
            layer.bias.data = torch.randint(-900, 900, layer.bias.shape) / 128
    return block, torch.randint(0, 16, (2, 16, 9, 7)).float()


@needs_bf16
def test_the_plain_path_is_that_of_pytorch_in_bf16() -> None:
    """Convolution, bias and residual are operations of their own, each with a rounding."""
    block, x = block_of_whole_numbers()
    with torch.no_grad():
        found = rounding.RoundedDoubleConv(block, ROUNDINGS.keys())(x)
        low = copy.deepcopy(block).bfloat16()
        convs = [low.conv1[0], low.conv2[0], low.conv2[3]]

        def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
            return F.conv2d(x, conv.weight, padding=1) + conv.bias[:, None, None]

        a = convolved(convs[0], x.bfloat16()).relu()
        b = convolved(convs[1], a).relu()
        expected = (convolved(convs[2], b) + a).relu()
        exact = rounding.RoundedDoubleConv(block, ())(x)
    assert torch.equal(found, expected.float())
    assert not torch.equal(found, exact)


@needs_bf16
def test_the_epilogue_is_that_of_a_convolution_with_bias() -> None:
    """A CPU adds the bias in float32, as cuDNN's epilogue does, and rounds once."""
    block, x = block_of_whole_numbers()
    once = ROUNDINGS.keys() - {"convolution", "sum"}
    with torch.no_grad():
        found = rounding.RoundedDoubleConv(block, once)._convolve(0, x)
        low = copy.deepcopy(block.conv1[0]).bfloat16()
        expected = low(x.bfloat16()).relu().float()
        twice = rounding.RoundedDoubleConv(block, ROUNDINGS.keys())._convolve(0, x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, twice)


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    model = trained_squid(decoder_memory=decoder_memory("MemoryMatrixBlockV3", 256, 4))
    with torch.no_grad():
        judged = trained_discriminator(model(image_batch(8, 64))["recon"])
    return Emulation(Bundle(model, judged), labelled(smooth_image_set(6, 64).images, anomalous=3))


def test_without_roundings_it_is_the_scorer_in_float32(emulation: Emulation) -> None:
    pair = emulation.bundle.model, emulation.bundle.discriminator
    scorer = Scorer(*pair, precision="float32", device="cpu")
    expected = scorer.raw_scores(emulation.images, [PAPER_SCORE])[PAPER_SCORE]
    torch.testing.assert_close(emulation.scores(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*ROUNDINGS, *OTHERS])
def test_every_rounding_moves_scores_a_little(emulation: Emulation, name: str) -> None:
    exact, found = emulation.scores(), emulation.scores({name})
    moved = (found - exact).abs()
    assert moved.max() > 0
    assert moved.max() < 0.5  # of a logit


def test_split_products_are_nearly_exact(emulation: Emulation) -> None:
    exact = emulation.scores()
    split, tf32 = (
        (emulation.scores({name}) - exact).abs().max()
        for name in ("discriminator split", "discriminator")
    )
    assert split < tf32 / 4


def test_ways_are_made_of_roundings_that_there_are() -> None:
    every = {*ROUNDINGS, *OTHERS}
    for rows in rounding.choices().values():
        for chosen in rows.values():
            assert set(chosen) <= every
            assert len(set(chosen)) == len(chosen)


def test_the_results_can_be_resumed_and_shown(
    emulation: Emulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"preset": "tiny", "epoch": 3, "training_images": 5}
    path = tmp_path / "accuracy" / "rounding.json"
    results = Results(path, CPU, {"images": 6, "about": about})
    rounding.measure(emulation, results)
    found = json.loads(path.read_text())
    assert found["scorers"][rounding.FLOAT32]["noise"] < 0.01
    assert found["ways"][rounding.PLAIN]["noise"] > 0.01
    del results.figures["alone"]["map"]
    scores = SimpleNamespace(calls=0)

    def counted(chosen: object = ()) -> Tensor:
        scores.calls += 1
        return Emulation.scores(emulation, chosen)

    monkeypatch.setattr(emulation, "scores", counted)
    rounding.measure(emulation, results)
    assert scores.calls == 2  # without a rounding, and the row that was missing
    assert json.loads(path.read_text())["alone"]["map"] == found["alone"]["map"]
    monkeypatch.setattr(measurements, "RESULTS", tmp_path)
    assert f"| {rounding.PLAIN} |" in tables.TABLES["ways"]()
    assert "`tiny` after epoch 3" in tables.TABLES["ways"]()
    noise = found["alone"]["bias"]["noise"]
    assert f"| `bias`: {ROUNDINGS['bias']} | {noise:.4f} |" in tables.TABLES["roundings"]()
