"""Every verb and every function with every precision: it computes in it, or refuses at the door.

CI runs this file a second time as a processor without AVX-512 would (``make avx2``).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from squid_fast import PRESETS, Scorer, load_bundle
from squid_fast.cli import ablation as cli_ablation
from squid_fast.data import DigitAnatomy
from squid_fast.experiments.ablation import digit_data
from squid_fast.experiments.baselines import train_baseline
from squid_fast.inference import calibrate
from squid_fast.inference.quantization import has_int8
from squid_fast.training import train_bundle
from squid_fast.utils.devices import BF16_UNITS, INT8_UNITS, cpu_has
from tests.command_line import squid
from tests.processor import HAS_BF16

pytest.importorskip("typer")
pytest.importorskip("lightning_fabric")

COMPUTED_IN = {"auto": True, "float32": True, "bf16": HAS_BF16, "int8": has_int8()}
TRAINING = ("auto", "float32", "bf16")
REFUSED = {
    "bf16": "precision is 'bf16', which needs hardware that computes in bfloat16",
    "int8": "precision is 'int8', which needs a processor with int8 products",
}
TRAIN = (
    "--preset", "small", "--epochs", 1, "--batch-size", 4, "--device", "cpu", "--no-pictures"
)  # fmt: skip

scoring = pytest.mark.parametrize("precision", COMPUTED_IN)
training = pytest.mark.parametrize("precision", TRAINING)


@pytest.fixture(scope="module")
def run(grids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    squid("train", *TRAIN, "--data", grids, "--out", out)
    return out


def computes(precision: str, *arguments: Any, out: Path) -> bool:
    """Call a verb: true when it did its work, false when it refused before there was any."""
    done = squid(*arguments, "--precision", precision, check=False)
    if COMPUTED_IN[precision]:
        assert done.returncode == 0, done.stderr
        return True
    assert done.returncode == 1
    assert done.stderr.startswith(f"squid-fast: {REFUSED[precision]}")  # and nothing before it
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()
    return False


@training
def test_train(grids: Path, precision: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    if computes(precision, "train", *TRAIN, "--data", grids, "--out", out, out=out):
        settings = torch.load(out / "checkpoint.pt", weights_only=True)["settings"]
        best = "bf16" if HAS_BF16 else "float32"
        assert settings["precision"] == (best if precision == "auto" else precision)


@training
@pytest.mark.parametrize("method", ["autoencoder", "knn"])
def test_train_what_squid_is_compared_with(
    grids: Path, method: str, precision: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    computes(precision, "train", *TRAIN, "--method", method, "--data", grids, "--out", out, out=out)


@training
def test_ablate(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_ablation, "digit_data", partial(digit_data, held_out=20))
    out = tmp_path / "ablation"
    size = ("--epochs", 1, "--grids", 16, "--variants", "no_teacher", "--device", "cpu")
    if computes(precision, "ablate", "--out", out, *size, out=out):
        assert "without the teacher" in (out / "ablation.md").read_text()


@scoring
def test_evaluate(grids: Path, run: Path, precision: str, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    where = ("--data", grids, "--out", out, "--device", "cpu")
    if computes(precision, "evaluate", run, *where, out=out):
        figures = json.loads((out / "evaluation.json").read_text())
        assert figures["patch_error"]["n_normal"] == 8


@scoring
def test_screen(grids: Path, run: Path, precision: str, tmp_path: Path) -> None:
    out, images = tmp_path / "table.jsonl", grids / "images" / "test"
    if computes(precision, "screen", run, images, "--out", out, "--device", "cpu", out=out):
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == 16
        assert all(row["error"] is None for row in rows)


@scoring
def test_bench(run: Path, precision: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    quick = ("--rounds", 1, "--seconds", 0, "--batch-size", 2, "--device", "cpu", "--bundle", run)
    if computes(precision, "bench", *quick, "--out", out, out=out):
        found = json.loads(out.read_text())
        assert precision in ("auto", found["precision"])
        row = f"squid_fast.Scorer, {found['precision']}, batch of 2"
        assert found["evaluation"][row]["images"] == 2


@pytest.mark.skipif(HAS_BF16, reason="this processor computes in bfloat16")
def test_python_is_refused_bf16_too(run: Path, tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match=REFUSED["bf16"])
    loaded = load_bundle(run)
    pair = loaded.model, loaded.discriminator
    images = DigitAnatomy(None, 16, "train").normal(20, 0).as_image_set()
    small = PRESETS["small"]
    with refused:
        Scorer(*pair, precision="bf16", device="cpu")
    with refused:
        Scorer.load(tmp_path / "none", precision="bf16", device="cpu")
    with refused:
        calibrate(*pair, images, precision="bf16", device="cpu")
    with refused:
        train_bundle(small, images, tmp_path / "run", precision="bf16", device="cpu")
    with refused:
        train_baseline("knn", images, tmp_path / "run", precision="bf16", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(has_int8(), reason="this processor has int8 products")
def test_python_is_refused_int8_before_images_are_scored(run: Path) -> None:
    loaded = load_bundle(run)
    pair = loaded.model, loaded.discriminator
    images = DigitAnatomy(None, 16, "train").normal(20, 0).as_image_set()
    for call in (
        partial(Scorer, *pair, loaded.calibration),
        partial(calibrate, *pair, images),
        partial(Scorer.load, run),
    ):
        with pytest.raises(ValueError, match=REFUSED["int8"]):
            call(precision="int8", device="cpu")


def test_what_onednn_may_not_use_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    for here in (["avx512_bf16", "avx512_vnni"], ["avx_vnni"], ["amx_bf16", "amx_int8"], []):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda h=here: dict.fromkeys(h, True))
        for limit, bf16, int8 in (
            ("ALL", BF16_UNITS, INT8_UNITS),
            ("AVX2", (), ()),
            ("avx2_vnni", (), ("avx_vnni",)),
            ("AVX512_CORE", (), ()),
            ("AVX512_CORE_VNNI", (), ("avx512_vnni",)),
            ("AVX512_CORE_BF16", ("avx512_bf16",), ("avx512_vnni",)),
        ):
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
            assert cpu_has(BF16_UNITS) == bool(set(here) & set(bf16)), (here, limit)
            assert cpu_has(INT8_UNITS) == bool(set(here) & set(int8)), (here, limit)
