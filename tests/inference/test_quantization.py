"""Convolutions in int8."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from squid_fast import Bundle, calibrate
from squid_fast.inference import AGREEMENT
from squid_fast.inference import calibration as calibration_module
from squid_fast.inference.convolution import FoldedConv
from squid_fast.inference.network import FrozenGenerator
from squid_fast.inference.quantization import MinMaxObserver, QuantizedConv, QuantParams, has_int8
from squid_fast.inference.scores import PAPER_SCORE, Calibration, Quantization
from squid_fast.inference.stages import QuantizedStage
from tests.factories import scorer_of, smooth_image_set, trained_discriminator, trained_squid
from tests.inference.test_network import CONFIGS
from tests.processor import needs_int8

# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [(0.0, 3.0), (-1.0, 2.0), (-2.0, 0.0), (0.5, 1.0), (0.0, 0.0)])
def test_quantized_values_keep_zero_and_the_range_to_half_a_step(span: tuple[float, float]) -> None:
    params = QuantParams.from_range(*span)
    assert 0 <= params.zero_point <= 255
    zero = torch.zeros(1)
    assert params.dequantize(params.quantize(zero), torch.float32) == 0
    values = torch.linspace(min(span[0], 0), max(span[1], 0), 1001)
    found = params.dequantize(params.quantize(values), torch.float32)
    # The ends may lie half a step outside, since zero stays exact.
    assert (found - values).abs().max() <= 1.01 * params.scale
    assert (found - values)[100:-100].abs().max() <= 0.501 * params.scale + 1e-7


def test_what_lies_outside_goes_to_the_nearest_end() -> None:
    params = QuantParams.from_range(-1.0, 3.0)
    codes = params.quantize(torch.tensor([-50.0, 50.0, float("inf"), -float("inf")]))
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [0, 255, 255, 0]


def test_ranges_cut_off_what_makes_the_scale_coarse() -> None:
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
def test_a_quantized_convolution_is_that_of_dequantized_maps(zero: int, stride: int) -> None:
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
    quantized = QuantizedConv(conv, source, target)
    codes = quantized(x)
    assert torch.equal(copy.deepcopy(quantized)(x), codes)  # although packed weights are not copied
    assert codes.dtype == torch.uint8
    off = target.dequantize(codes, torch.float32) - expected.clamp_max(255 * target.scale)
    assert off.abs().max() <= 0.51 * target.scale

    residual = torch.randint(0, 256, expected.shape, dtype=torch.uint8)
    residual = residual.contiguous(memory_format=torch.channels_last)
    added = conv(values, other.dequantize(residual, torch.float32))
    summed = QuantizedConv(conv, source, target, other)(x, residual.clone())
    off = target.dequantize(summed, torch.float32) - added.clamp_max(255 * target.scale)
    assert off.abs().max() <= 0.51 * target.scale
    floats = other.dequantize(residual, torch.float32)
    in_floats = QuantizedConv(conv, source, torch.float32)(x, floats)
    torch.testing.assert_close(in_floats, added, rtol=1e-4, atol=1e-4)


# --- networks -------------------------------------------------------------------------------------

ALL = ["downs.0", "downs.1", "ups.0", "ups.1"]


@needs_int8
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stages", [ALL, ["downs.0"], ["ups.0"], ["downs.1", "ups.1"], []])
def test_any_stages_can_be_in_int8(name: str, stages: list[str]) -> None:
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
    in_int8 = [n for n, module in found.named_modules() if isinstance(module, QuantizedStage)]
    assert sorted(in_int8) == sorted(stages)
    assert error < 0.25
    assert bool(error > 1e-6) == bool(stages)


@pytest.fixture(scope="module")
def scored() -> Bundle:
    # Hard shrinkage is continuous; which slots are the best k depends on differences as small as
    # rounding, and on these everything in an untrained model.
    model = trained_squid(**CONFIGS["published shape"], shrink_thres=1e-6)
    torch.manual_seed(1)
    normal = smooth_image_set(64, model.image_size)
    discriminator = trained_discriminator(normal.batch(slice(0, 32)))
    return Bundle(model, discriminator, calibrate(model, discriminator, normal, device="cpu"))


@needs_int8
def test_stages_that_move_the_score_stay_in_floats(scored: Bundle) -> None:
    # An untrained discriminator makes much of the smallest difference.
    known = scored.calibration.quantization
    assert known.stages == []
    assert known.agreement[PAPER_SCORE] < AGREEMENT
    assert scorer_of(scored, precision="auto").precision != "int8"


@needs_int8
def test_stages_that_may_are_in_int8_and_their_agreement_is_what_was_measured(
    scored: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = scored.model, scored.discriminator
    monkeypatch.setattr(calibration_module, "_NOISE", 100.0)
    normal = smooth_image_set(64, scored.model.image_size)
    bundle = Bundle(*pair, calibrate(*pair, normal, device="cpu"))
    known = bundle.calibration.quantization
    assert known.stages == ALL
    exact, found = (scorer_of(bundle, None, p).raw_scores(normal) for p in ("float32", "int8"))
    for name in ("discriminator_instance", "reconstruction_error"):
        expected = torch.corrcoef(torch.stack([rank(exact[name]), rank(found[name])]))[0, 1]
        assert known.agreement[name] == pytest.approx(float(expected), abs=1e-5)
    assert known.agreement["reconstruction_error"] > 0.9


def rank(values: Tensor) -> Tensor:
    order = values.argsort()
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(values))
    return ranks.double()


@needs_int8
@pytest.mark.parametrize("agreement", [AGREEMENT, 0.99])
def test_int8_is_chosen_only_where_it_ranks_alike(scored: Bundle, agreement: float) -> None:
    known = scored.calibration.quantization
    known = replace(known, stages=[], agreement=dict.fromkeys(known.agreement, agreement))
    bundle = replace(scored, calibration=replace(scored.calibration, quantization=known))
    chosen = scorer_of(bundle, precision="auto").precision
    assert (chosen == "int8") == (agreement >= AGREEMENT)


def test_a_calibration_with_ranges_comes_back_from_json() -> None:
    known = Quantization(["ups.0"], {"ups.0.first": (-1.0, 2.5)}, {"patch_error": 0.9995})
    for quantization in (known, None):
        calibration = Calibration({}, [0.1], [0.2], "training", quantization)
        assert Calibration.from_json(calibration.to_json()) == calibration


def test_int8_without_ranges_is_refused(scored: Bundle) -> None:
    wanted = "holds no ranges" if has_int8() else "needs a processor with int8 products"
    with pytest.raises(ValueError, match=wanted):
        scorer_of(replace(scored, calibration=None), precision="int8")
