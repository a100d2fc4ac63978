"""Convolutions in bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from squid_fast import Discriminator, Scorer, calibrate
from squid_fast.inference import AGREEMENT
from squid_fast.inference import calibration as calibration_module
from squid_fast.inference.convolution import FoldedConv
from squid_fast.inference.network import FrozenGenerator, QuantizedStage
from squid_fast.inference.quantization import MinMaxObserver, QuantizedConv, QuantParams, has_int8
from squid_fast.inference.scores import PAPER_SCORE, Calibration, Quantization
from tests.factories import smooth_image_set, trained_squid
from tests.inference.test_network import CONFIGS
from tests.processor import needs_int8

# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [(0.0, 3.0), (-1.0, 2.0), (-2.0, 0.0), (0.5, 1.0), (0.0, 0.0)])
def test_a_grid_holds_zero_and_its_range_to_half_a_step(span: tuple[float, float]) -> None:
    params = QuantParams.from_range(*span)
    assert 0 <= params.zero_point <= 255
    zero = torch.zeros(1)
    assert params.dequantize(params.quantize(zero), torch.float32) == 0
    values = torch.linspace(min(span[0], 0), max(span[1], 0), 1001)
    found = params.dequantize(params.quantize(values), torch.float32)
    # The ends may lie half a step outside, since zero is on the params.
    assert (found - values).abs().max() <= 1.01 * params.scale
    assert (found - values)[100:-100].abs().max() <= 0.501 * params.scale + 1e-7


def test_what_lies_outside_goes_to_the_nearest_end() -> None:
    params = QuantParams.from_range(-1.0, 3.0)
    codes = params.quantize(torch.tensor([-50.0, 50.0, float("inf"), -float("inf")]))
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [0, 255, 255, 0]


def test_ranges_cut_off_what_makes_the_grid_coarse() -> None:
    conv = FoldedConv(torch.ones(1, 1, 1, 1), torch.zeros(1), [1, 1], [0, 0])
    network = nn.Sequential(conv)
    observer = MinMaxObserver(network)
    values = torch.rand(1, 1, 256, 256)
    values[0, 0, 0, 1] = 3.0
    network(values)
    observer.close()
    network(values + 100)  # is not seen any more
    assert observer.min_max["0"] == (0.0, 3.0)
    low, high = observer.ranges()["0"]
    assert low == 0
    assert 0.97 < high < 1.1


# --- convolutions ---------------------------------------------------------------------------------


@needs_int8
@pytest.mark.parametrize("zero", [0, 90])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_in_bytes_is_the_convolution_of_what_they_stand_for(
    zero: int, stride: int
) -> None:
    torch.manual_seed(0)
    source, target, other = QuantParams(0.02, zero), QuantParams(0.05, 0), QuantParams(0.03, 0)
    x = torch.randint(0, 256, (2, 16, 9, 9), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    # Weights on their own grid of 127 steps, so that nothing of them is lost.
    weight = torch.randint(-127, 128, (32, 16, 3, 3)).float() / 500
    weight[:, 0, 0, 0] = 127 / 500
    conv = FoldedConv(weight, torch.randn(32), [stride, stride], [1, 1])
    values = source.dequantize(x, torch.float32)
    expected = conv(values)
    in_floats = QuantizedConv(conv, source, torch.float32)(x)
    torch.testing.assert_close(in_floats, expected, rtol=1e-4, atol=1e-4)
    as_bytes = QuantizedConv(conv, source, target)(x)
    assert as_bytes.dtype == torch.uint8
    off = target.dequantize(as_bytes, torch.float32) - expected.clamp_max(255 * target.scale)
    assert off.abs().max() <= 0.51 * target.scale

    residual = torch.randint(0, 256, expected.shape, dtype=torch.uint8)
    residual = residual.contiguous(memory_format=torch.channels_last)
    added = FoldedConv.forward(conv, values, other.dequantize(residual, torch.float32))
    summed = QuantizedConv(conv, source, target, other)(x, residual.clone())
    off = target.dequantize(summed, torch.float32) - added.clamp_max(255 * target.scale)
    assert off.abs().max() <= 0.51 * target.scale
    in_floats = QuantizedConv(conv, source, torch.float32)(
        x, other.dequantize(residual, torch.float32)
    )
    torch.testing.assert_close(in_floats, added, rtol=1e-4, atol=1e-4)


# --- networks -------------------------------------------------------------------------------------

ALL = ["downs.0", "downs.1", "ups.0", "ups.1"]


@needs_int8
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stages", [ALL, ["downs.0"], ["ups.0"], ["downs.1", "ups.1"], []])
def test_any_stages_can_be_in_bytes(name: str, stages: list[str]) -> None:
    model = trained_squid(**CONFIGS[name])
    side = model.image_size
    images = smooth_image_set(4, side).batch(slice(None)).repeat(1, model.num_in_ch, 1, 1)
    exact = FrozenGenerator(model, torch.float32, torch.channels_last, True)
    observer = MinMaxObserver(exact)
    with torch.inference_mode():
        expected = exact(images)
        observer.close()
        chosen = Quantization(stages, observer.ranges(), {})
        found = FrozenGenerator(model, torch.float32, torch.channels_last, True, chosen)
        error = (found(images) - expected).square().mean().sqrt() / expected.std()
    in_bytes = [n for n, module in found.named_modules() if isinstance(module, QuantizedStage)]
    assert sorted(in_bytes) == sorted(stages)
    assert error < 0.25
    assert bool(error > 1e-6) == bool(stages)


@pytest.fixture(scope="module")
def scored() -> tuple[object, Discriminator, Calibration]:
    # Hard shrinkage is continuous. Which slots are the best k hangs on differences that rounding
    # changes, and in an untrained model everything hangs on that.
    model = trained_squid(**CONFIGS["published shape"], shrink_thres=1e-6)
    torch.manual_seed(1)
    judge = Discriminator(-(-model.image_size // 32))
    normal = smooth_image_set(64, model.image_size)
    judge.train()
    with torch.no_grad():
        judge(normal.batch(slice(0, 32)))
    calibration = calibrate(model, judge.eval(), normal, device="cpu")
    return model, judge, calibration


@needs_int8
def test_stages_that_move_the_score_stay_in_floats(scored) -> None:
    # An untrained discriminator makes much of the smallest difference.
    model, judge, calibration = scored
    assert calibration.quantization.stages == []
    assert calibration.quantization.agreement[PAPER_SCORE] < AGREEMENT
    assert Scorer(model, judge, calibration, device="cpu").precision != "int8"


@needs_int8
def test_stages_that_may_are_in_bytes_and_their_agreement_is_what_was_measured(
    scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, judge, _ = scored
    monkeypatch.setattr(calibration_module, "_NOISE", 100.0)
    normal = smooth_image_set(64, model.image_size)
    calibration = calibrate(model, judge, normal, device="cpu")
    assert calibration.quantization.stages == ALL
    values = {
        precision: Scorer(model, judge, calibration, precision=precision, device="cpu").raw_scores(
            normal
        )
        for precision in ("float32", "int8")
    }
    for name in ("discriminator_instance", "reconstruction_error"):
        right, found = values["float32"][name], values["int8"][name]
        expected = float(torch.corrcoef(torch.stack([rank(right), rank(found)]))[0, 1])
        assert calibration.quantization.agreement[name] == pytest.approx(expected, abs=1e-5)
    assert calibration.quantization.agreement["reconstruction_error"] > 0.9


def rank(values: Tensor) -> Tensor:
    order = values.argsort()
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(values))
    return ranks.double()


@needs_int8
@pytest.mark.parametrize("agreement", [AGREEMENT, 0.99])
def test_bytes_are_used_unasked_only_where_they_rank_alike(scored, agreement: float) -> None:
    model, judge, calibration = scored
    names = calibration.quantization.agreement
    known = Quantization([], calibration.quantization.ranges, dict.fromkeys(names, agreement))
    values = calibration.to_json() | {"quantization": None}
    changed = Calibration.from_json(values)
    assert changed.quantization is None
    object.__setattr__(changed, "quantization", known)
    chosen = Scorer(model, judge, changed, device="cpu").precision
    assert (chosen == "int8") == (agreement >= AGREEMENT)


def test_a_calibration_with_ranges_comes_back_from_json() -> None:
    known = Quantization(["ups.0"], {"ups.0.first": (-1.0, 2.5)}, {"patch_error": 0.9995})
    calibration = Calibration({}, [0.1], [0.2], "training", known)
    assert Calibration.from_json(calibration.to_json()) == calibration


def test_bytes_without_ranges_are_refused(scored) -> None:
    model, judge, _ = scored
    wanted = "holds no ranges" if has_int8() else "needs a processor with int8 products"
    with pytest.raises(ValueError, match=wanted):
        Scorer(model, judge, precision="int8", device="cpu")
