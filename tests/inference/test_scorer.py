"""Scorer, calibration, bundle, conversion of published checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import multiprocessing
import pickle
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from squid_fast import SQUID, Bundle, Discriminator, Scorer, load_bundle, reference, save_bundle
from squid_fast.inference import calibrate
from squid_fast.inference.bundle import BundleError, load_published
from squid_fast.inference.scores import PAPER_SCORE, SCORES
from tests.factories import SIDE, TINY, image_batch, image_set, scorer_of, tiny_bundle, tiny_pair
from tests.processor import needs_bf16


@pytest.fixture
def bundle() -> Bundle:
    return tiny_bundle()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


# --- scores ---------------------------------------------------------------------------------------


def test_the_discriminators_scores_are_the_references(bundle: Bundle) -> None:
    images = image_batch(6, seed=9)
    plain = reference.SQUID(**TINY).double()
    plain.load_state_dict(bundle.model.state_dict())
    discriminator = reference.Discriminator(2).double()
    discriminator.load_state_dict(bundle.discriminator.state_dict())
    with torch.no_grad():
        recon = plain.eval()(images.double())["recon"]
        raw = {
            f"discriminator_{mode}": reference.discriminator_logits(
                discriminator.eval(), recon, mode
            )
            for mode in ("instance", "running")
        }
        of_images = reference.discriminator_logits(discriminator, images.double(), "instance")
        raw["discriminator_image"] = of_images
    for name, expected in raw.items():
        scorer = scorer_of(bundle, name)
        scores = scorer.score(images, reconstruction=True)
        own = bundle.calibration.scores[name]
        torch.testing.assert_close(scores.raw.double(), expected, rtol=1e-4, atol=1e-4)
        exact = scores.raw.double()
        z = reference.z_score(exact, own.mean, own.std)
        torch.testing.assert_close(scores.z_score, z.float())
        anomaly = 1 - torch.sigmoid((exact - own.mean) / own.std)
        torch.testing.assert_close(scores.anomaly_score, anomaly.float())
        torch.testing.assert_close(scores.reconstruction.double(), recon, rtol=1e-5, atol=1e-5)


def test_error_scores_against_their_definition(bundle: Bundle) -> None:
    images = image_set(5, seed=3)
    scorer = scorer_of(bundle, precision="auto")
    batch = images.batch(slice(0, 5))
    recon = scorer.score(batch, reconstruction=True).reconstruction
    raw = scorer.raw_scores(images)
    squared = (recon - batch).square()[:, 0]
    torch.testing.assert_close(raw["reconstruction_error"], squared.mean(dim=(1, 2)))
    half = SIDE // 2
    quarters = squared.unflatten(1, (2, half)).unflatten(3, (2, half)).mean(dim=(2, 4)).flatten(1)
    known = bundle.calibration
    mean, std = torch.tensor(known.patch_mean), torch.tensor(known.patch_std)
    torch.testing.assert_close(raw["patch_error"], ((quarters - mean) / std).amax(dim=1))


@pytest.mark.parametrize("score", SCORES)
def test_float32_scores_are_the_same_to_the_bit_in_any_batch_and_order(
    bundle: Bundle, score: str
) -> None:
    scorer = scorer_of(bundle, score)
    images = image_batch(37, seed=2)
    whole = scorer.score(images).raw
    for size in (1, 2, 3, 7, 8, 9, 16, 36):
        parts = [scorer.score(part).raw for part in images.split(size)]
        assert torch.equal(torch.cat(parts), whole), size
    order = torch.randperm(37, generator=torch.manual_seed(3))
    assert torch.equal(scorer.score(images[order]).raw, whole[order])
    assert scorer.score(images[:0]).raw.shape == (0,)


@pytest.mark.parametrize("score", SCORES)
def test_settings_of_the_caller_do_not_reach_the_scores(bundle: Bundle, score: str) -> None:
    images = image_batch(9, seed=2)
    expected = scorer_of(bundle, score).score(images)
    made_before = scorer_of(bundle, score)
    for setting in (
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cpu", torch.float16),
        torch.device("meta"),
        default_dtype(torch.float64),
    ):
        with setting:
            both = [scorer.score(images) for scorer in (made_before, scorer_of(bundle, score))]
        for scores in both:
            assert torch.equal(scores.raw, expected.raw)
            assert torch.equal(scores.z_score, expected.z_score)


@needs_bf16
def test_bf16_scores_hardly_depend_on_the_batch(bundle: Bundle) -> None:
    scorer = scorer_of(bundle, precision="bf16")
    images = image_batch(20, seed=2)
    whole = scorer.score(images).raw
    for size in (1, 3, 8):
        parts = torch.cat([scorer.score(part).raw for part in images.split(size)])
        assert (parts - whole).abs().max() <= 0.01 * whole.std()


def test_what_a_scorer_is_not_made_of_is_named(bundle: Bundle) -> None:
    model, discriminator, known = bundle.model, bundle.discriminator, bundle.calibration
    other = dataclasses.replace(known, patch_mean=[0.1] * 9, patch_std=[1.0] * 9)
    for arguments, sentence in (
        ((discriminator, model), "model is of the type Discriminator; it must be of the type SQU"),
        ((model, Discriminator(4)), r"a Discriminator\(4\); for images of 48 pixels a Discriminat"),
        ((model, discriminator, known.to_json()), "calibration is of the type dict; it must be"),
        (
            (model, discriminator, other),
            "of a model with 9 patches, but this one has 4; squid_fast",
        ),
        ((model, discriminator, known, ["patch_error"]), r"score is \['patch_error'\]; it must"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            Scorer(*arguments, device="cpu")
    mixed = image_set(6, anomalous=2)
    with pytest.raises(ValueError, match=r"^2 of 6 images of normal_training are labelled anomal"):
        calibrate(model, discriminator, mixed, device="cpu")
    scorer = scorer_of(bundle)
    for names, sentence in ((["error"], "score is 'error'; it must be one"), ("x", "score is 'x'")):
        with pytest.raises(ValueError, match=sentence):
            scorer.raw_scores(mixed, names)
    with pytest.raises(TypeError, match="images is of the type Tensor; it must be of the type Ima"):
        scorer.raw_scores(mixed.images)
    assert scorer.raw_scores(mixed.subset([]), "patch_error")["patch_error"].shape == (0,)


def test_what_wraps_a_model_is_left_out(bundle: Bundle) -> None:
    images = image_batch(3, seed=2)
    expected = scorer_of(bundle).score(images).z_score
    for wrap in (torch.nn.DataParallel, partial(torch.compile, backend="eager")):
        pair = wrap(bundle.model), wrap(bundle.discriminator)
        scorer = Scorer(*pair, bundle.calibration, precision="float32", device="cpu")
        assert torch.equal(scorer.score(images).z_score, expected)


def test_a_scorer_without_calibration_measures_all_that_needs_none(bundle: Bundle) -> None:
    images = image_set(5, seed=2)
    plain = Scorer(bundle.model, bundle.discriminator, precision="float32", device="cpu")
    expected = scorer_of(bundle).raw_scores(images)
    raw = plain.raw_scores(images)
    assert raw.keys() == expected.keys() - {"patch_error"}
    for name, values in raw.items():
        assert torch.equal(values, expected[name])


def test_bytes_are_images_too(bundle: Bundle) -> None:
    scorer = scorer_of(bundle, precision="auto")
    images = image_set(3)
    as_floats = scorer.score(images.batch(slice(0, 3))).raw
    assert torch.equal(scorer.score(images.images).raw, as_floats)
    assert scorer.prefetch(images.images) is images.images
    for wrong in (images.images.long(), images.images.to(torch.int8), images.images > 9):
        said = f"images are {wrong.dtype}; floating-point values in [0, 1], or uint8, of which 255"
        with pytest.raises(ValueError, match=re.escape(said)):
            scorer.score(wrong)
    with pytest.raises(ValueError, match=r"images are of the type ndarray; a tensor of floating"):
        scorer.score(images.images.numpy())
    with pytest.raises(ValueError, match=r"images are \[3, 48, 48\]; this model takes"):
        scorer.score(images.images[:, 0])


def test_a_fingerprint_says_what_made_a_score(bundle: Bundle, tmp_path: Path) -> None:
    save_bundle(bundle, tmp_path)

    def fingerprint(score: str | None = None) -> str:
        return Scorer.load(tmp_path, score, "float32", "cpu").fingerprint

    first = fingerprint()
    assert fingerprint() == first == fingerprint("discriminator_instance")
    others = {fingerprint("patch_error")}
    with torch.no_grad():
        bundle.discriminator.regressor.bias += 1e-3
    save_bundle(bundle, tmp_path)
    others.add(fingerprint())
    calibration = json.loads((tmp_path / "calibration.json").read_text())
    calibration["scores"]["discriminator_instance"]["threshold"] += 1
    (tmp_path / "calibration.json").write_text(json.dumps(calibration))
    others.add(fingerprint())
    assert len(others | {first}) == 4


@needs_bf16
def test_a_fingerprint_says_the_precision(bundle: Bundle) -> None:
    assert scorer_of(bundle).fingerprint != scorer_of(bundle, precision="bf16").fingerprint


def test_calibration_of_normal_images(bundle: Bundle) -> None:
    scorer = scorer_of(bundle)
    training, validation = map(scorer.raw_scores, (image_set(30), image_set(40, seed=5)))
    assert bundle.calibration.threshold_images == "validation"
    for name in SCORES:
        z = scorer.z_score(name, training[name])
        assert abs(float(z.mean())) < 1e-3
        assert float(z.std()) == pytest.approx(1, abs=1e-3)
        held_out = scorer.z_score(name, validation[name])
        own = bundle.calibration.scores[name]
        assert (held_out > own.threshold).float().mean() <= 0.1
        assert own.false_positive_rate == 0.1
        np.testing.assert_allclose(own.reference_z, np.sort(held_out), atol=1e-3)


def test_too_few_validation_images_leave_the_threshold_to_training() -> None:
    pair = tiny_pair()
    calibration = calibrate(*pair, image_set(30), image_set(5), 0.1, device="cpu")
    assert calibration.threshold_images == "training"
    with pytest.raises(ValueError, match="rate is 0; it must lie"):
        calibrate(*pair, image_set(30), None, 0)
    with pytest.raises(ValueError, match="1 normal images cannot calibrate"):
        calibrate(*pair, image_set(1), None, 0.5)


def test_evaluate_ranks_by_z_score(bundle: Bundle) -> None:
    images = image_set(20, seed=4)
    images.labels[1::2] = 1
    images.images[1::2] //= 2  # another kind of image
    scorer = scorer_of(bundle, precision="auto")
    evaluations, z = scorer.evaluate(images)
    assert evaluations.keys() == z.keys() == SCORES.keys()
    for name, evaluation in evaluations.items():
        better = np.sign(z[name][1::2][:, None] - z[name][::2][None])
        assert evaluation.auroc == pytest.approx((better.mean() + 1) / 2)
        assert evaluation.calibrated.threshold == bundle.calibration.scores[name].threshold


def test_an_uncalibrated_scorer_says_so() -> None:
    pair = tiny_pair()
    scorer = Scorer(*pair, device="cpu")
    with pytest.raises(ValueError, match="no calibration"):
        scorer.score(torch.rand(1, 1, SIDE, SIDE))
    with pytest.raises(ValueError, match="score is 'magic'; it must be one of"):
        Scorer(*pair, score="magic")
    choices = "it must be 'auto', 'int8', 'bf16' or 'float32'"
    with pytest.raises(ValueError, match=f"precision is 'int4'; {choices}"):
        Scorer(*pair, precision="int4")


@needs_bf16
def test_bf16_stays_close(bundle: Bundle) -> None:
    images = image_batch(4, seed=8)
    exact, found = (
        scorer_of(bundle, "patch_error", precision).score(images, reconstruction=True)
        for precision in ("float32", "bf16")
    )
    assert found.reconstruction.dtype == torch.float32
    assert 0 < (exact.reconstruction - found.reconstruction).abs().max() < 0.02


# --- copies ---------------------------------------------------------------------------------------


def raw_of(scorer: Scorer, images: torch.Tensor) -> torch.Tensor:
    return scorer.score(images).raw


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=needs_bf16)])
def test_copies_score_the_same_bits(bundle: Bundle, precision: str) -> None:
    scorer = scorer_of(bundle, precision=precision)
    images = image_batch(11, seed=4)
    before = copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))
    few, all_of_them = scorer.score(images[:3]).raw, scorer.score(images).raw
    after = copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))
    for twin in before:
        assert torch.equal(twin.score(images[:3]).raw, few)
        assert torch.equal(twin.score(images).raw, all_of_them)
    for twin in (*after, copy.deepcopy(after[0])):  # whose first batch is of another size
        assert torch.equal(twin.score(images).raw, all_of_them)
        assert torch.equal(twin.score(images[:3]).raw, few)
        assert (twin.fingerprint, twin.threshold) == (scorer.fingerprint, scorer.threshold)
    own, other = (dict(x.model.weights()) for x in (scorer, after[0]))
    assert all(value.data_ptr() != other[name].data_ptr() for name, value in own.items())


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("features_root", [8, 16])  # the second is channels-last
def test_torch_save_and_every_protocol_of_pickle_keep_a_scorer(
    features_root: int, precision: str
) -> None:
    torch.manual_seed(0)
    model = SQUID(**TINY | {"features_root": features_root, "memory_channel": 36 * features_root})
    images = image_set(5, seed=4)
    for backend in ("eager", "compile"):  # which have different first convolutions
        scorer = Scorer(model, Discriminator(2), None, PAPER_SCORE, precision, "cpu", backend)
        file = io.BytesIO()
        torch.save(scorer, file)
        file.seek(0)
        twins = [pickle.loads(pickle.dumps(scorer, protocol)) for protocol in range(6)]
        for twin in (*twins, torch.load(file, weights_only=False)):
            assert twin.fingerprint == scorer.fingerprint
            if backend == "eager":
                found, expected = twin.raw_scores(images), scorer.raw_scores(images)
                assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_scorer_goes_to_a_spawned_process_after_it_has_scored(bundle: Bundle) -> None:
    scorer, images = scorer_of(bundle), image_batch(5, seed=4)
    expected = scorer.score(images).raw
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert torch.equal(pool.submit(raw_of, scorer, images).result(timeout=300), expected)


def test_a_compiled_scorer_is_copied_uncompiled(bundle: Bundle) -> None:
    pair = bundle.model, bundle.discriminator
    scorer = Scorer(*pair, bundle.calibration, precision="float32", device="cpu", backend="compile")
    for twin in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        assert twin.backend == "compile"
        assert twin.model._compiled is not scorer.model._compiled
        assert twin.fingerprint == scorer.fingerprint


# --- bundle ---------------------------------------------------------------------------------------


def test_a_bundle_comes_back_as_it_was(bundle: Bundle, tmp_path: Path) -> None:
    save_bundle(bundle, tmp_path / "b")
    back = load_bundle(tmp_path / "b")
    for part in ("model", "discriminator"):
        held, found = (getattr(x, part).state_dict() for x in (bundle, back))
        assert all(torch.equal(value, found[name]) for name, value in held.items())
    assert int(back.model.inpaint_block.memory.ptr) == 8
    assert back.calibration == bundle.calibration
    assert (back.score, back.about) == (bundle.score, bundle.about)
    modes = {path.name: path.stat().st_mode & 0o444 for path in (tmp_path / "b").iterdir()}
    weights = {"discriminator.safetensors", "model.safetensors"}
    assert modes.keys() == {"calibration.json", "config.json"} | weights
    assert modes["model.safetensors"] == modes["config.json"]
    images = image_batch(3)
    ours = scorer_of(bundle, precision="auto")
    loaded = Scorer.load(tmp_path / "b", device="cpu")
    assert torch.equal(ours.score(images).raw, loaded.score(images).raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / "config.json").unlink(), "config.json is missing"),
        (lambda b: (b / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda b: (b / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda b: (b / "model.safetensors").write_bytes(b"x" * 100), "cannot be read as safetens"),
        (
            lambda b: shutil.copy(b / "model.safetensors", b / "discriminator.safetensors"),
            "discriminator.safetensors do not fit",
        ),
        (lambda b: (b / "calibration.json").write_text("{}"), "calibration.json is damaged"),
    ],
)
def test_a_damaged_bundle_is_refused(bundle: Bundle, tmp_path: Path, damage, message: str) -> None:
    save_bundle(bundle, tmp_path)
    damage(tmp_path)
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path)


def test_a_bundle_of_another_format_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    save_bundle(bundle, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(BundleError, match="has format 99; this version of squid_fast reads"):
        load_bundle(tmp_path)
    with pytest.raises(BundleError, match="is not a folder"):
        load_bundle(tmp_path / "config.json")


# --- published checkpoints ------------------------------------------------------------------------


def test_published_checkpoints_become_models(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain, discriminator = reference.SQUID(**TINY).eval(), reference.Discriminator(2).eval()
    torch.save({f"module.{k}": v for k, v in plain.state_dict().items()}, tmp_path / "g.pth")
    torch.save(discriminator.state_dict(), tmp_path / "d.pth")
    pair = load_published(tmp_path / "g.pth", tmp_path / "d.pth", TINY)
    images = torch.rand(2, 1, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(pair[0](images)["recon"], plain(images)["recon"])
        torch.testing.assert_close(pair[1](images), discriminator(images))


def test_checkpoints_with_code_or_of_other_models_are_refused(tmp_path: Path) -> None:
    plain, discriminator = reference.SQUID(**TINY), reference.Discriminator(2)
    torch.save(plain.state_dict(), tmp_path / "g.pth")
    torch.save(discriminator.state_dict(), tmp_path / "d.pth")
    torch.save(discriminator, tmp_path / "code.pth")
    with pytest.raises(BundleError, match="cannot be read as a checkpoint of plain tensors"):
        load_published(tmp_path / "g.pth", tmp_path / "code.pth", TINY)
    with pytest.raises(BundleError, match="do not fit the configuration"):
        load_published(tmp_path / "d.pth", tmp_path / "d.pth", TINY)
    state = discriminator.state_dict()
    state["regressor.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(BundleError, match=r"NaN or infinite weights in regressor\.bias"):
        load_published(tmp_path / "g.pth", tmp_path / "nan.pth", TINY)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("score", ["discriminator_instance", "reconstruction_error"])
def test_a_gpu_scores_as_a_cpu_does(bundle: Bundle, score: str) -> None:
    cpu, gpu = (scorer_of(bundle, score, device=device) for device in ("cpu", "cuda"))
    images = image_set(12, seed=11).images
    expected = cpu.score(images, reconstruction=True)
    for size in (12, 5, 12, 1):  # captured, captured anew, replayed
        # The next part is on its way while one is scored, as in screening.
        ahead = [gpu.prefetch(part) for part in images.split(size)]
        found = [gpu.score(part, reconstruction=True) for part in ahead]
        raw = torch.cat([part.raw for part in found])
        torch.testing.assert_close(raw, expected.raw, rtol=1e-2, atol=1e-3)
        recon = torch.cat([part.reconstruction for part in found])
        torch.testing.assert_close(recon, expected.reconstruction, rtol=1e-3, atol=1e-3)


def test_a_calibration_older_than_a_score_goes_on_serving_the_others(
    bundle: Bundle,
) -> None:
    scores = {k: v for k, v in bundle.calibration.scores.items() if k != "discriminator_image"}
    older = dataclasses.replace(bundle.calibration, scores=scores)
    older = dataclasses.replace(bundle, calibration=older)
    assert scorer_of(older).evaluate(image_set(6, anomalous=3, seed=9))[0].keys() == scores.keys()
    with pytest.raises(ValueError, match="lacks 'discriminator_image': it is older"):
        scorer_of(older, "discriminator_image").score(image_batch(1))
