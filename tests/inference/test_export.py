"""What is exported scores as the scorer does, where squid_fast is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import squid_fast
from squid_fast import Bundle, Scorer
from squid_fast.inference import calibrate, export
from squid_fast.inference.export import METADATA_FILE, OUTPUTS, write_export
from tests.command_line import squid
from tests.factories import (
    decoder_memory,
    scorer_of,
    smooth_image_set,
    trained_discriminator,
    trained_squid,
)
from tests.processor import needs_bf16

BATCHES = (1, 3, 16)

# Both sides compute in float32, but sum in another order: reconstructions differed by 3e-6 at most.
# Scores are compared in deviations of normal images. The random models here make reconstructions
# that vary little, which magnifies such differences to 6e-5; with a trained one it was 1e-5.
RECONSTRUCTION = 3e-5
DEVIATIONS = 1e-3


# As the presets are built: chest X-ray, DigitAnatomy, and without skips as the small one; then what
# else a model may have. The widths let the scorer compute channels-last (16) and contiguous (8).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chest X-ray": (
        "discriminator_instance",
        {"memory_channel": 400, "decoder_memory": decoder_memory("MemoryMatrixBlock", 25, 4)},
    ),
    "DigitAnatomy": (
        "patch_error",
        {
            "features_root": 8, "num_patch": 3, "memory_channel": 72,
            "decoder_memory": decoder_memory("MemoryMatrixBlockV3", 36, 9),
        },
    ),
    "hard shrinkage, no skips": (
        "reconstruction_error",
        {
            "features_root": 8, "num_patch": 3, "level": 1, "shrink_thres": 0.001,
            "memory_channel": 144, "ops": ["none"],
        },
    ),
    "no shrinkage, one memory": (
        "discriminator_running",
        {
            "features_root": 8, "shrink_thres": 0, "memory_channel": 200, "initial_combine": None,
            "ops": ["none", "concat"],
            "decoder_memory": decoder_memory("MemoryMatrixBlockV4", 100, 4),
        },
    ),
}  # fmt: skip


def unseen(side: int, n: int = 16) -> Tensor:
    return smooth_image_set(n, side, seed=99).batch(slice(None))


def bundle_of(case: str) -> Bundle:
    score, changes = CASES[case]
    model = trained_squid(**changes)
    # Zeros, which it starts with, would hide the places outside the grid.
    torch.nn.init.normal_(model.inpaint_block.attention.in_proj_bias, std=0.1)
    normal = smooth_image_set(48, model.image_size, seed=7)
    discriminator = trained_discriminator(normal.batch(slice(0, 32)))
    with pytest.MonkeyPatch.context() as patch:  # 8-bit scoring is not exported; it takes long
        patch.setattr("squid_fast.inference.calibration.has_int8", lambda: False)
        known = calibrate(model, discriminator, normal, None, 0.1, "float32", "cpu")
    return Bundle(model, discriminator, known, score)


def assert_same(found: list[Tensor], scorer: Scorer, images: Tensor) -> None:
    expected = scorer.score(images, reconstruction=True)
    raw, z, anomaly, reconstruction = found
    assert expected.reconstruction is not None
    deviation = scorer.calibration.scores[scorer.score_name].std
    for name, value, right, bound in (
        ("raw", raw, expected.raw, DEVIATIONS * deviation),
        ("z_score", z, expected.z_score, DEVIATIONS),
        ("anomaly_score", anomaly, expected.anomaly_score, DEVIATIONS / 4),  # its slope
        ("reconstruction", reconstruction, expected.reconstruction, RECONSTRUCTION),
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value, right, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def chest() -> Bundle:
    return bundle_of("chest X-ray")


# --- ONNX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_onnx_scores_as_the_scorer_does(case: str, chest: Bundle, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    scorer = scorer_of(chest if case == "chest X-ray" else bundle_of(case))
    side, path = scorer.image_size, tmp_path / "model.onnx"
    path.write_text("of before")
    images = unseen(side)
    before = scorer.score(images, reconstruction=True)
    write_export(scorer, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    after = scorer.score(images, reconstruction=True)
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in OUTPUTS)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    whole = ["batch", 1, side, side]
    assert [(x.name, x.shape) for x in session.get_inputs()] == [("images", whole)]
    shapes = [["batch"], ["batch"], ["batch"], whole]
    given = [(x.name, x.shape) for x in session.get_outputs()]
    assert given == list(zip(OUTPUTS, shapes, strict=True))

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]

    assert before.z_score.std() > 300 * DEVIATIONS  # else anything would do
    assert before.raw.std() > 1e-3 * before.raw.abs().mean()  # or float32 could not tell
    for count in BATCHES:
        assert_same(run(images[:count]), scorer, images[:count])

    broken = images[:4].clone()
    broken[1, 0, side // 2, side // 2] = torch.nan
    broken[3, 0, 0, 0] = torch.inf
    for found in run(broken)[:3]:
        assert found.isnan().tolist() == [False, True, False, True]
    assert_same([x[::2] for x in run(broken)], scorer, images[:4:2])

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {x.domain for x in model.opset_import} == {""}
    assert len({x.version for x in model.opset_import}) == 1
    assert not model.functions
    facts = session.get_modelmeta().custom_metadata_map
    assert float(facts["threshold"]) == scorer.threshold
    assert float(facts["false_positive_rate"]) == 0.1
    assert facts.items() >= {
        "score": scorer.score_name, "image_size": str(side),
        "squid_fast_version": squid_fast.__version__, "scorer_fingerprint": scorer.fingerprint,
    }.items()  # fmt: skip
    assert "not a medical device" in facts["notice"]
    assert str(Path(squid_fast.__file__).parent).encode() not in path.read_bytes()


# --- torch.export ---------------------------------------------------------------------------------

ALONE = """
import sys
sys.modules["squid_fast"] = None  # importing it is an error from here on
import torch
facts = {"squid_fast.json": ""}
program = torch.export.load(sys.argv[1], extra_files=facts)
images = torch.load(sys.argv[2])
module = program.module()
found = {count: module(images[:count]) for count in (1, 3, 16)}
torch.save((found, facts["squid_fast.json"]), sys.argv[3])
"""


def test_the_verb_writes_a_program_that_runs_without_squid_fast(
    chest: Bundle, tmp_path: Path
) -> None:
    pytest.importorskip("typer")
    squid_fast.save_bundle(chest, tmp_path / "bundle")
    path, score = tmp_path / "model.pt2", "discriminator_running"
    images = unseen(chest.model.image_size)
    torch.save(images, tmp_path / "images.pt")
    alone = [sys.executable, "-c", ALONE, path, tmp_path / "images.pt", tmp_path / "found.pt"]
    written = squid("export", tmp_path / "bundle", "--out", path, "--score", score)
    ran = subprocess.run(alone, capture_output=True, text=True, timeout=300)
    for done in (written, ran):
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    found, facts = torch.load(tmp_path / "found.pt")
    scorer = scorer_of(chest, score)
    for count in BATCHES:
        assert_same(list(found[count]), scorer, images[:count])
    assert json.loads(facts)["score"] == score
    assert json.loads(facts)["threshold"] == repr(scorer.threshold)
    assert METADATA_FILE == "squid_fast.json"
    assert str(Path(squid_fast.__file__).parent).encode() not in path.read_bytes()


@pytest.fixture(scope="module")
def program(chest: Bundle) -> torch.export.ExportedProgram:
    return scorer_of(chest).to_torch_export()


def test_a_program_holds_aten_operations_alone(program: torch.export.ExportedProgram) -> None:
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.topk.default in calls
    assert torch.ops.aten.conv2d.default in calls
    for call in calls:
        assert getattr(call, "namespace", "aten") == "aten", call
        assert "squid_fast" not in str(getattr(call, "__module__", "")), call


def test_a_program_takes_any_number_of_images(
    chest: Bundle, program: torch.export.ExportedProgram
) -> None:
    scorer, images = scorer_of(chest), unseen(chest.model.image_size, 33)
    for count in (2, 7, 33):
        assert_same(list(program.module()(images[:count])), scorer, images[:count])


def test_slots_are_projected_once(program: torch.export.ExportedProgram) -> None:
    nodes = {node.name: node for node in program.graph.nodes}
    held = program.graph_signature.inputs_to_buffers
    (projected,) = (nodes[node] for node, name in held.items() if name.endswith(".projected"))
    assert projected.users


# --- errors ---------------------------------------------------------------------------------------


@needs_bf16
def test_a_scorer_in_bf16_cannot_be_exported(chest: Bundle) -> None:
    with pytest.raises(ValueError, match=r"computes in bf16 on cpu.*precision='float32'"):
        scorer_of(chest, precision="bf16").to_torch_export()


def test_what_cannot_be_exported_is_refused_at_once(chest: Bundle, tmp_path: Path) -> None:
    plain = Scorer(chest.model, chest.discriminator, precision="float32", device="cpu")
    with pytest.raises(ValueError, match="has no calibration"):
        write_export(plain, tmp_path / "model.pt2")
    for name in ("model.pt", "model"):
        with pytest.raises(ValueError, match=r"ends in '(.pt)?'; .onnx or .pt2"):
            write_export(scorer_of(chest), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_export(scorer_of(chest), tmp_path / "nowhere" / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(
    chest: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'pip install "squid-fast\[export\]"'):
        write_export(scorer_of(chest), tmp_path / "model.onnx")


def test_a_failed_export_leaves_the_old_file(
    chest: Bundle,
    program: torch.export.ExportedProgram,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    path.write_text("of before")
    monkeypatch.setattr(Scorer, "to_torch_export", lambda scorer: program)
    monkeypatch.setattr(export, "_LARGEST_ONNX", 10**6)
    with pytest.raises(ValueError, match=r"weights take 0\.\d GB, but an ONNX file holds at most"):
        write_export(scorer_of(chest), path)
    assert path.read_text() == "of before"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
