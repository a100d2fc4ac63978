"""What SQUID is compared with: each method against its definition, and through the verbs."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

import squid_fast
from squid_fast.data import ImageSet
from squid_fast.experiments import baselines
from squid_fast.experiments.baselines import (
    METHODS,
    RECIPE,
    BaselineResult,
    BaselineScorer,
    load_scorer,
    train_baseline,
)
from squid_fast.experiments.baselines.networks import AutoEncoder, MemAE, PixelInpainting
from squid_fast.experiments.baselines.shallow import (
    Mahalanobis,
    NearestNeighbours,
    PcaResidual,
    pixels,
)
from squid_fast.inference.bundle import BundleError
from squid_fast.training import CheckpointError
from squid_fast.training.checkpoint import load_checkpoint, save_checkpoint
from tests.command_line import squid
from tests.factories import labelled
from tests.training.test_training import after_steps

SIDE = 32
TINY = dataclasses.replace(RECIPE, epochs=3, t_max=3, batch_size=8, shift=0.0, scale=0.0)
OPTIONS = {"recipe": TINY, "device": "cpu", "precision": "float32"}


def waves(count: int, seed: int, anomalous: int = 0) -> ImageSet:
    """Smooth waves of random phase; the anomalous ones have a bright square."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.28 * torch.rand(count, 1, 1, 1, generator=generator)
    axis = torch.linspace(0, 6.28, SIDE)
    images = 0.4 + 0.2 * torch.sin(axis + phase) + 0.1 * torch.cos(axis[:, None] + phase)
    images += 0.01 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    images[:anomalous, :, 8:18, 10:20] = 1.0
    return labelled((images * 255).round().byte(), anomalous)


def train_longer(name: str, out: Path) -> Path:
    options = OPTIONS | {"recipe": dataclasses.replace(TINY, epochs=8, t_max=8)}
    options |= {"validation_set": waves(40, 1, 20), "false_positive_rate": 0.1}
    assert train_baseline(name, waves(64, 0), out, **options).finished
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("methods")
    return {name: train_longer(name, folder / name) for name in METHODS}


# A square adds edges, which are the contrary of what smoothness looks for.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "smoothness"])
def test_every_method_finds_a_bright_square(name: str, trained: dict[str, Path]) -> None:
    scorer = load_scorer(trained[name], device="cpu")
    assert isinstance(scorer, BaselineScorer)
    test = waves(60, 2, 30)
    evaluations, z = scorer.evaluate(test)
    (figures,) = evaluations.values()
    assert figures.auroc > 0.95
    assert figures.calibrated is not None
    assert figures.calibrated.specificity > 0.6
    about = json.loads((trained[name] / "config.json").read_text())["about"]
    assert about["machine"]["threads"] == torch.get_num_threads()
    (area,) = about["validation"].values()
    assert area > 0.95
    whole = scorer.score(test.images, reconstruction=True)
    (from_evaluate,) = z.values()
    np.testing.assert_allclose(whole.z_score, from_evaluate, rtol=1e-4, atol=1e-4)
    ones = torch.cat([scorer.score(image[None]).z_score for image in test.images])
    torch.testing.assert_close(ones, whole.z_score, rtol=1e-4, atol=1e-4)
    assert whole.reconstruction is not None
    square = whole.reconstruction[:30, :, 8:18, 10:20]
    assert float(square.mean()) < 0.95  # what is normal there is not white


def test_training_again_gives_the_same_scores(trained: dict[str, Path], tmp_path: Path) -> None:
    for name in ("pca", "memae"):
        again = train_longer(name, tmp_path / name)
        one, other = (load_scorer(path, device="cpu") for path in (trained[name], again))
        assert one.fingerprint == other.fingerprint
        images = waves(5, 3).images
        assert torch.equal(one.score(images).raw, other.score(images).raw)


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_scorers_score_the_same_bits(name: str, trained: dict[str, Path]) -> None:
    scorer = load_scorer(trained[name], device="cpu")
    images = waves(5, 1).images
    expected = scorer.score(images).raw
    for twin in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        assert torch.equal(twin.score(images).raw, expected)
        assert (twin.fingerprint, twin.threshold) == (scorer.fingerprint, scorer.threshold)


def test_a_network_can_be_copied_while_it_is_trained() -> None:
    network = MemAE(image_size=32, width=4)
    images = torch.rand(2, 1, 32, 32)
    loss = network.loss(images)
    twin = copy.deepcopy(network)
    loss.backward()
    assert torch.equal(twin.eval().reconstruct(images), network.eval().reconstruct(images))


def test_smoothness_finds_blur_alone(trained: dict[str, Path]) -> None:
    scorer = load_scorer(trained["smoothness"], device="cpu")
    normal = waves(20, 2).images
    blurred = avg_pool2d(normal.float(), 9, 1, 4, count_include_pad=False).round().byte()
    sharp, smooth = (scorer.score(images).z_score for images in (normal, blurred))
    assert sharp.max() < smooth.min()
    small = pixels(normal / 255).view(20, 32, 32).numpy()
    squares = [(np.diff(small, axis=axis) ** 2).mean(axis=(1, 2)) for axis in (1, 2)]
    differences = np.diff(np.log(squares[0] + squares[1]))
    np.testing.assert_allclose(
        -np.diff(scorer.score(normal).raw), differences, rtol=1e-4, atol=1e-6
    )


def test_shallow_methods_are_their_definitions() -> None:
    train, test = waves(50, 0), waves(7, 5, 3)
    known, asked = (pixels(s.batch(slice(None))).numpy() for s in (train, test))
    images = test.batch(slice(0, 7))

    centred = known - known.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    share = np.cumsum(values**2) / (values**2).sum()
    axes = axes[: int(np.searchsorted(share, 0.95)) + 1]
    away = asked - known.mean(axis=0)
    residual = np.linalg.norm(away - away @ axes.T @ axes, axis=1)
    np.testing.assert_allclose(PcaResidual.fit(train)(images)[0], residual, rtol=1e-6)

    every = np.linalg.norm(asked[:, None] - known[None], axis=2)
    nearest = np.sort(every, axis=1)[:, :5].mean(axis=1)
    found, counterpart = NearestNeighbours.fit(train)(images)
    np.testing.assert_allclose(found, nearest, rtol=1e-6)
    picture = known[every.argmin(axis=1)].reshape(7, 1, 32, 32)
    np.testing.assert_allclose(counterpart, picture, atol=1e-6)

    method = Mahalanobis.fit(train)
    covariance = np.linalg.inv(method.precision.numpy())
    shrunk = np.trace(centred.T @ centred / 50) / covariance.shape[0] * np.eye(1024)
    empirical = centred.T @ centred / 50
    mix = ((covariance - empirical) * (shrunk - empirical)).sum() / (
        (shrunk - empirical) ** 2
    ).sum()
    np.testing.assert_allclose(covariance, (1 - mix) * empirical + mix * shrunk, atol=1e-7)
    squared = np.einsum("bi,ij,bj->b", away, np.linalg.inv(covariance), away)
    np.testing.assert_allclose(method(images)[0], np.sqrt(squared), rtol=1e-5)


def test_memae_answers_with_slots_shrunk_as_published() -> None:
    torch.manual_seed(0)
    network = MemAE(num_slots=7, threshold=1.0, image_size=32, width=4, levels=2, latent=3)
    latent = 5 * torch.randn(2, 3, 2, 2)
    slots = network.memory.slots[0].detach().double().numpy()
    answer = network.remember(latent).detach().numpy()
    for b in range(2):
        for i in range(2):
            for j in range(2):
                a = np.exp(slots @ latent[b, :, i, j].double().numpy())
                a = a / a.sum()
                kept = np.maximum(a - 1 / 7, 0) * a / (abs(a - 1 / 7) + 1e-12)
                kept /= kept.sum()
                np.testing.assert_allclose(answer[b, :, i, j], kept @ slots, rtol=1e-4, atol=1e-6)
    images = torch.rand(2, 1, 32, 32)
    network.loss(images).backward()
    assert float(network.memory.slots.grad.abs().max()) > 0


def test_every_pixel_is_cut_out_once_and_not_seen_when_filled() -> None:
    torch.manual_seed(0)
    network = PixelInpainting(image_size=48, width=4, levels=2).eval()
    images = torch.rand(1, 1, 48, 48)
    masks = network.masks(images)
    assert torch.equal(torch.stack(masks).sum(dim=0), torch.ones(1, 1, 48, 48))
    changed = images.clone()
    changed[..., 13, 20] = 1 - changed[..., 13, 20]
    before, after = network(images)[1], network(changed)[1]
    cut = next(mask for mask in masks if mask[0, 0, 13, 20])[0, 0].bool()
    assert torch.equal(before[0, 0][cut], after[0, 0][cut])
    assert not torch.equal(before, after)


def test_a_stopped_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    train_in = partial(train_baseline, "pixel_inpainting", waves(20, 0), **OPTIONS)
    train_in(whole)
    stopped = train_in(part, should_stop=after_steps(3))
    assert (stopped.finished, stopped.step) == (False, 3)
    assert not (part / "config.json").exists()
    with pytest.raises(CheckpointError, match="already holds a run; add --resume"):
        train_in(part)
    with pytest.raises(CheckpointError, match="other settings: seed was 0 and is 1"):
        train_in(part, resume=True, seed=1)
    assert train_in(part, resume=True).finished
    assert load_scorer(whole).fingerprint == load_scorer(part).fingerprint


def test_a_checkpoint_of_the_former_format_is_resumed(tmp_path: Path) -> None:
    images, whole, part = waves(20, 0), tmp_path / "whole", tmp_path / "part"
    train_baseline("autoencoder", images, whole, **OPTIONS)
    train_baseline("autoencoder", images, part, **OPTIONS, should_stop=after_steps(3))
    new = load_checkpoint(part / "checkpoint.pt")
    recipe = new["settings"]["recipe"]
    recipe["averaging"] = recipe.pop("ema_decay")
    old = {
        "step": new["step"],
        "settings": {
            "method": "autoencoder", "recipe": recipe, "images": images.fingerprint, "seed": 0,
            "precision": "float32",
        },
        "loss": torch.tensor(0.1),
        "threads": 1,
        "generator": new["generator"],
        "optimizer": new["optimizers"][0],
    }  # fmt: skip
    save_checkpoint(old, part / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"model\.method was 'autoencoder' and is 'memae'"):
        train_baseline("memae", images, part, **OPTIONS, resume=True)
    with pytest.raises(CheckpointError, match="images_sha256 was"):
        train_baseline("autoencoder", waves(20, 1), part, **OPTIONS, resume=True)
    assert train_baseline("autoencoder", images, part, **OPTIONS, resume=True).finished
    assert load_scorer(whole).fingerprint == load_scorer(part).fingerprint


def test_former_names_are_accepted() -> None:
    former = {"train_method": train_baseline, "MethodResult": BaselineResult}
    for old, new in {**former, "ComparisonScorer": BaselineScorer}.items():
        with pytest.warns(DeprecationWarning, match=f"{old} is now"):
            assert getattr(baselines, old) is new


def test_what_does_not_fit_is_said(trained: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method is 'svm'; known are squid, pca"):
        train_baseline("svm", waves(8, 0), tmp_path)
    with pytest.raises(ValueError, match="3 training images, fewer than a batch of 16"):
        train_baseline("autoencoder", waves(3, 0), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="image_size is 30; 16 must divide it"):
        AutoEncoder(image_size=30)
    with pytest.raises(BundleError, match="holds a 'pca', not SQUID"):
        squid_fast.Scorer.load(trained["pca"])
    with pytest.raises(ValueError, match="a pca has 'distance' alone"):
        load_scorer(trained["pca"], "patch_error")
    with pytest.raises(ValueError, match="a memae is scored in 'float32'"):
        load_scorer(trained["memae"], precision="int8")
    scorer = load_scorer(trained["pca"])
    with pytest.raises(ValueError, match=r"this pca takes \[B, 1, 32, 32\]"):
        scorer.score(torch.zeros(1, 1, 48, 48))
    with pytest.raises(ValueError, match=r"1 of 2 images .* the greatest is 255; divide by 255"):
        scorer.score(torch.tensor([1.0, 255.0]).view(2, 1, 1, 1).expand(2, 1, 32, 32))
    with pytest.raises(ValueError, match="1 of 1 images hold NaN"):
        scorer.score(torch.full((1, 1, 32, 32), torch.nan))
    with pytest.raises(ValueError, match=r"images are torch\.int16; floating-point values"):
        scorer.score(torch.zeros(1, 1, 32, 32, dtype=torch.int16))
    broken = shutil.copytree(trained["memae"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match="does not hold a trained method"):
        load_scorer(broken)


@pytest.mark.parametrize("method", ["knn", "autoencoder"])
def test_the_verbs_take_a_method(method: str, tmp_path: Path) -> None:
    for split, (count, anomalous) in {"train": (24, 0), "val": (20, 10), "test": (20, 10)}.items():
        found = waves(count, len(split), anomalous)
        for name, image, label in zip(found.paths, found.images, found.labels, strict=True):
            folder = tmp_path / "data" / split / ("PNEUMONIA" if label else "NORMAL")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{name}.png")
    run, data = tmp_path / "run", tmp_path / "data"
    squid(
        "train", "--method", method, "--preset", "small", "--data", data, "--out", run,
        "--epochs", 2, "--batch-size", 8, "--device", "cpu",
    )  # fmt: skip
    done = squid("evaluate", run, "--data", data, "--json", "--device", "cpu")
    figures = json.loads(done.stdout)
    (score,) = figures
    assert score == METHODS[method][0].score_name
    assert figures[score]["n_anomalous"] == 10
    table = tmp_path / "rows.csv"
    squid(
        "screen", run, data / "test", "--out", table, "--report", tmp_path / "r.html",
        "--device", "cpu", "--workers", 0,
    )  # fmt: skip
    assert len(table.read_text().splitlines()) == 21
    assert f">{score}," in (tmp_path / "r.html").read_text()
