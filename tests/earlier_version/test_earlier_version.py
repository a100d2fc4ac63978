"""Bundles and checkpoints of an earlier version are read, score as they did, and train on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from squid_fast.experiments.baselines import load_scorer, train_baseline
from squid_fast.experiments.baselines.networks import AutoEncoder
from squid_fast.training import train_bundle
from squid_fast.utils.machine import describe
from tests.earlier_version.write import DATA, HERE, OPTIONS, PRESET, RECIPE, SCORES, SHOWN, narrow
from tests.tolerances import assert_close

pytest.importorskip("lightning_fabric")

WRITTEN = json.loads((HERE / "scores.json").read_text())


def same_processor() -> bool:
    """Of the kind that the files were written on, on which float32 is the same to the bit."""
    here, there = describe(torch.device("cpu")), WRITTEN["machine"]
    return all(here[fact] == there[fact] for fact in ("device", "instructions", "torch"))


@pytest.fixture(autouse=True)
def narrow_networks() -> Iterator[None]:
    with narrow(AutoEncoder):
        yield


@pytest.fixture
def files(tmp_path: Path) -> Path:
    shutil.unpack_archive(HERE / "files.tar.xz", tmp_path)
    return tmp_path


def assert_scores_as_then(folder: Path, method: str, score: str) -> None:
    scores = load_scorer(folder, score, "float32", "cpu").score(SHOWN.images)
    raw, z = (torch.tensor(value) for value in WRITTEN[f"{method}/{score}"])
    if same_processor():
        assert torch.equal(scores.raw.float(), raw)
        assert torch.equal(scores.z_score, z)
    else:  # the z-score magnifies rounding, by how much is the bundle's affair
        assert_close(scores.raw.float(), raw, 1e-5, floor=1.0)


@pytest.mark.parametrize(("method", "score"), SCORES)
def test_a_bundle_scores_as_it_did(method: str, score: str, files: Path) -> None:
    assert_scores_as_then(files / method, method, score)


def cancelled_biases(names: Collection[str]) -> set[str]:
    """Biases in front of a batch norm, and its running means, which count them."""
    found = set()
    for name in names:
        layer, _, last = name.rpartition(".")
        parent, _, index = layer.rpartition(".")
        mean = f"{parent}.{int(index) + 1}.running_mean" if index.isdigit() else ""
        if last == "bias" and mean in names:
            found |= {name, mean}
    return found


def assert_same_weights(folder: Path, other: Path) -> None:
    """Of cancelled biases the earlier version trained the rounding noise; now they stay."""
    for path in other.glob("*.safetensors"):
        found, expected = load_file(folder / path.name), load_file(path)
        assert found.keys() == expected.keys()
        moved = cancelled_biases(expected.keys())
        assert moved
        for name, value in expected.items() if same_processor() else ():
            # 1e-5 is a tenth of a step of Adam, which magnifies the rounding of small gradients.
            assert_close(found[name], value, 1e-2 if name in moved else 1e-5, floor=1.0)


def test_a_stopped_run_ends_as_the_earlier_version_ended_it(files: Path) -> None:
    out = files / "squid_stopped"
    result = train_bundle(PRESET, DATA, out, resume=True, **OPTIONS)
    assert (result.finished, result.step) == (True, 12)
    assert_same_weights(out, files / "squid")


def test_a_stopped_baseline_ends_as_the_earlier_version_ended_it(files: Path) -> None:
    out = files / "autoencoder_stopped"
    result = train_baseline("autoencoder", DATA, out, recipe=RECIPE, resume=True, **OPTIONS)
    assert (result.finished, result.step) == (True, 12)
    assert_same_weights(out, files / "autoencoder")
