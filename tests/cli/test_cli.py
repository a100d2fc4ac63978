"""The command line as a user meets it: train, stop, resume, evaluate, screen, convert, synth."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")

import torch
import typer

from squid_fast import PRESETS, reference
from squid_fast.cli import app
from squid_fast.data.layouts import LAYOUTS
from squid_fast.experiments.baselines import METHODS
from squid_fast.inference.scores import SCORES
from tests.command_line import squid, squid_apart

pytest.importorskip("lightning_fabric")
Image = pytest.importorskip("PIL.Image")
soak = pytest.importorskip("bench.scoring.soak")

TRAIN = ("--preset", "small", "--epochs", "2", "--batch-size", "4", "--device", "cpu")


def rows_of(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text().splitlines()))


@pytest.fixture(scope="module")
def run(grids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, trained for a moment."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = squid("train", *TRAIN, "--data", grids, "--out", out, "--json")
    assert json.loads(done.stdout)["finished"] is True
    return out


def test_synth_writes_what_train_reads(grids: Path) -> None:
    rows = rows_of(grids / "labels.csv")
    assert len(rows) == 12 + 2 * 24 + 2 * 8
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    assert all((grids / row["image_path"]).is_file() for row in rows)


def test_training_leaves_a_bundle_and_its_curves(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "model.safetensors", "discriminator.safetensors", "config.json", "calibration.json",
        "checkpoint.pt", "metrics.csv",
    }  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    assert config["about"]["preset"] == "small"
    assert config["about"]["training_images"] == 12
    machine = config["about"]["machine"]
    assert (machine["processes"], machine["threads"] >= 1) == (1, True)
    figures = {row["name"] for row in rows_of(run / "metrics.csv")}
    assert "loss/reconstruction" in figures
    assert "validation/auroc_discriminator_instance" in figures


def test_ctrl_c_saves_and_resume_ends_the_same(grids: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    arguments = [*TRAIN, "--data", str(grids), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "squid_fast", "train", *arguments, "--epochs", "4000"],
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = out / "metrics.csv"
    for _ in range(600):
        if metrics.exists() and "loss/" in metrics.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "go on with --resume" in said
    assert (out / "checkpoint.pt").exists()
    assert not (out / "config.json").exists()
    again = squid("train", *arguments, check=False)
    assert again.returncode == 1
    assert "already holds a run; add --resume" in again.stderr

    def state(folder: Path) -> dict[str, float]:
        rows = rows_of(folder / "metrics.csv")
        return {f"{row['step']} {row['name']}": float(row["value"]) for row in rows}

    # The stopped run was planned longer, but its first epoch is that of the finished run.
    first = {k: v for k, v in state(out).items() if k.startswith("3 loss")}
    assert first == {k: v for k, v in state(run).items() if k.startswith("3 loss")}


def test_evaluate_prints_and_writes_every_score(grids: Path, run: Path, tmp_path: Path) -> None:
    command = ("evaluate", run, "--data", grids, "--out", tmp_path, "--device", "cpu")
    done = squid(*command, "--json", "--all-scores")
    figures = json.loads(done.stdout)
    assert figures == json.loads((tmp_path / "evaluation.json").read_text())
    assert figures.keys() == {
        "discriminator_instance", "discriminator_running", "discriminator_image",
        "reconstruction_error", "patch_error", "memory_distance", "teacher_difference",
        "combined_discriminator", "combined_errors",
    }  # fmt: skip
    for figure in figures.values():
        assert figure["n_normal"] == figure["n_anomalous"] == 8
        assert figure["auroc_interval"][0] <= figure["auroc"] <= figure["auroc_interval"][1]
        assert figure["paper_best_test_accuracy"]["accuracy"] >= 0.5
    with Image.open(tmp_path / "roc.png") as picture:
        assert picture.size[0] > 300
    table = squid(*command).stdout
    assert "AUROC" in table
    assert "teacher_difference" not in table


def broken_files(folder: Path) -> dict[str, str | None]:
    """Ten files as archives have them: name to a part of the error, None where it can be read."""
    pixels = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "good.jpeg")
    whole = (folder / "good.jpeg").read_bytes()
    (folder / "truncated.jpeg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    Image.fromarray((pixels * 257).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.dstack([pixels.astype(np.uint8)] * 4), "CMYK").save(folder / "cmyk.jpeg")
    frames = [Image.fromarray((pixels / n).astype(np.uint8)) for n in (1, 2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    size = (30_000).to_bytes(4, "big") * 2
    parts = {b"IHDR": size + b"\x08\x00\x00\x00\x00", b"IDAT": zlib.compress(b""), b"IEND": b""}
    chunks = [
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in parts.items()
    ]
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    expected: dict[str, str | None] = {
        "good.jpeg": None, "truncated.jpeg": "truncated", "empty.png": "empty", "text.png": "",
        "deep.png": None, "cmyk.jpeg": None, "moving.gif": None, "huge.png": "too many pixels",
        "folder.png": "folder", "gone.png": "",
    }  # fmt: skip
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    dataset.save_as(folder / "nopixels.dcm", enforce_file_format=True)
    return expected | {"nopixels.dcm": "pixel"}


def test_every_file_has_its_row(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    expected = broken_files(folder)
    table, report = tmp_path / "out.csv", tmp_path / "report.html"
    done = squid_apart("screen", run, folder, "--out", table, "--report", report, "--json")
    rows = {Path(row["path"]).name: row for row in rows_of(table)}
    assert rows.keys() == expected.keys()
    for name, part in expected.items():
        error, scored = rows[name]["error"], bool(rows[name]["raw_score"])
        if part is None:
            assert (scored, error) == (True, ""), name
        else:
            assert error, name
            assert not scored, name
            assert part in error.lower(), name
    summary = json.loads(done.stdout)
    assert summary["count"] == len(expected)
    assert summary["errors"] == sum(part is not None for part in expected.values())
    assert "truncated.jpeg" in report.read_text()


def test_screening_ranks_by_the_score_asked_for(grids: Path, run: Path, tmp_path: Path) -> None:
    images = [str(grids / row["image_path"]) for row in rows_of(grids / "labels.csv")]
    columns = []
    for score in ("discriminator_instance", "patch_error"):
        out = tmp_path / f"{score}.jsonl"
        squid("screen", run, *images[:6], "--out", out, "--score", score, "--device", "cpu")
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["path"] for row in rows] == images[:6]
        columns.append([row["raw_score"] for row in rows])
    assert columns[0] != columns[1]


@pytest.mark.parametrize(("method", "score"), [("knn", "distance"), ("smoothness", "smoothness")])
def test_screening_by_the_score_of_a_baseline(
    grids: Path, tmp_path: Path, method: str, score: str
) -> None:
    run, out = tmp_path / "run", tmp_path / "table.jsonl"
    squid("train", *TRAIN, "--method", method, "--data", grids, "--out", run)
    command = ("screen", run, grids / "images" / "test", "--out", out, "--workers", 0)
    other = squid(*command, "--score", "patch_error", check=False)
    assert other.returncode == 1
    assert f"score is 'patch_error'; a {method} has '{score}' alone" in other.stderr
    squid(*command, "--score", score)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["error"] for row in rows] == [None] * 16


def test_ctrl_c_keeps_the_rows_and_resume_gives_the_whole_table(
    grids: Path, run: Path, tmp_path: Path
) -> None:
    folder, out, figures = tmp_path / "in", tmp_path / "r.jsonl", tmp_path / "summary.json"
    folder.mkdir()
    images = sorted((grids / row["image_path"]) for row in rows_of(grids / "labels.csv"))
    count = 1200
    for number in range(count):
        os.link(images[number % len(images)], folder / f"{number:04d}.png")
    arguments = ["screen", run, folder, "--out", out, "--precision", "float32", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "squid_fast", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    journal = tmp_path / "r.jsonl.partial"
    while process.poll() is None and not soak.rows_done(out):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the readers too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    done = soak.rows_done(out)
    assert 0 < done < count
    assert f"stopped: {done:,} of 1,200 rows are safe in {str(journal)!r}; go on with --r" in said
    assert "Traceback" not in said
    assert not out.exists()

    refused = squid(*arguments, check=False)
    assert refused.returncode == 1
    assert "holds an unfinished run of 'r.jsonl': go on with --resume, or delete" in refused.stderr
    other = squid(*arguments, "--resume", "--score", "reconstruction_error", check=False)
    assert other.returncode == 1
    assert "the score was 'discriminator_instance' and is 'reconstruction_error'" in other.stderr

    again = squid(*arguments, "--resume", "--summary", figures, "--json", "--timeout", 30)
    assert f"going on behind {done:,} of 1,200 rows" in again.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["path"] for row in rows] == [str(folder / f"{i:04d}.png") for i in range(count)]
    assert not journal.exists()
    for number, row in enumerate(rows):  # links to one image, scored before the stop and after it
        assert row["z_score"] == pytest.approx(rows[number % len(images)]["z_score"], abs=1e-3)
    summary = json.loads(figures.read_text())
    assert summary == json.loads(again.stdout)
    assert (summary["count"], summary["errors"]) == (count, 0)


def test_convert_turns_published_checkpoints_into_a_bundle(grids: Path, tmp_path: Path) -> None:
    generator, discriminator = tmp_path / "model.pth", tmp_path / "discriminator.pth"
    torch.manual_seed(0)
    torch.save(reference.SQUID(**PRESETS["small"].model).state_dict(), generator)
    torch.save(reference.Discriminator(2).state_dict(), discriminator)
    pair = ("--generator", generator, "--discriminator", discriminator)
    out = tmp_path / "bundle"
    squid("convert", *pair, "--out", out, "--preset", "small", "--data", grids)
    table = tmp_path / "t.csv"
    squid("screen", out, grids / "labels.csv", "--out", table)
    assert len(rows_of(table)) == 1  # the table itself is no image
    wrong = squid("convert", *pair, "--out", tmp_path / "w", "--preset", "zhanglab", check=False)
    assert wrong.returncode == 1
    assert "do not fit the configuration" in wrong.stderr
    assert not (tmp_path / "w").exists()


def test_mistakes_end_in_one_sentence(grids: Path, run: Path, tmp_path: Path) -> None:
    same = tmp_path / "same.csv"
    fresh = ("train", *TRAIN, "--data", grids, "--out", tmp_path / "fresh")
    cases = {
        ("train", "--data", grids, "--out", tmp_path, "--method", "knn", "--keep", "best"): (
            "--keep best has no effect on --method knn"
        ),
        ("train", "--data", tmp_path / "no", "--out", tmp_path): "no",
        ("train", *TRAIN, "--data", grids, "--out", tmp_path / "e", "--ema-decay", 1.5): (
            "is 1.5; it must lie in (0, 1)"
        ),
        ("screen", tmp_path, grids, "--out", "x.csv"): "config.json is missing",
        ("screen", run, grids, "--out", tmp_path / "x.xls"): ".parquet",
        ("screen", "no bundle", grids, "--out", tmp_path): "has the suffix ''",
        ("screen", "no bundle", grids, "--out", tmp_path / "no" / "x.csv"): "there is no folder",
        ("screen", "none", grids, "--out", "x.csv", "--summary", "no/s.json"): "no folder 'no'",
        ("screen", run, grids, "--out", tmp_path / "y.csv", "--timeout", -1): "timeout",
        ("pack", "--out", "no", "--size", 8): "nothing to read",
        ("pack", "x", "--out", "no"): "give either --size or --bundle",
        ("pack", "x", "--out", "no", "--size", 8, "--root", "y"): "--root is y, but",
        ("evaluate", run, "--data", grids, "--split", "exam"): "split 'exam'",
        ("evaluate", run, "--data", grids, "--split", "train"): "'train' are of one class",
        ("screen", run, grids, "--out", same, "--report", same): "the same file as --out",
        ("screen", run, grids, "--out", same, "--summary", run / "config.json"): "would overwrite",
        ("screen", run, "--list", same, "--out", same): "would overwrite the input",
        ("bench", "--bundle", run, "--out", run / "calibration.json"): "would overwrite",
        ("bench", "--seconds", "inf"): "seconds inf",
        ("export", run, "--out", tmp_path): "ends in ''",
        ("pack", grids, "--size", 8, "--out", same): "is a file; name another",
        ("evaluate", run, "--data", grids, "--out", same): "is a file; name another",
        ("diagnose", run, "--data", grids, "--out", same / "x"): "is a file; name another",
        ("synth", same): "is a file; name another",
        ("synth", tmp_path / "s", "--seed", -1): "seed is -1",
        ("demo", "--out", tmp_path / "d", "--minutes", "inf"): "minutes is inf",
        ("demo", "--device", "gpu"): "device is 'gpu'",
        ("ablate", "--out", tmp_path / "a", "--variants", "full,none"): "variant is 'none'",
        ("ablate", "--out", same): "is a file; name another",
        (*fresh, "--score", "distance"): "--score is 'distance'; a squid has discriminator_",
        (*fresh, "--method", "knn", "--score", "patch_error"): "a knn has distance",
        (*fresh, "--false-positive-rate", 5): "the false-positive rate is 5.0; it must lie in",
        (*fresh, "--false-positive-rate", 0.01): "A rate of 0.0417 would fit",
        (*fresh, "--lr", "nan"): "lr is nan; it must be a number above 0",
        (*fresh, "--threads", 5000): "the number of threads is 5000",
        (*fresh, "--batch-size", 100): "fewer than a batch of 100",
        (*fresh, "--device", "cuda:x"): "device is 'cuda:x'",
        (*fresh, "--contaminate", grids, "--contamination-rate", 2): "the rate is 2.0",
        (*fresh[:-1], run): "already holds a run",
    }
    same.write_text("image_path\nx.png")
    for arguments, sentence in cases.items():
        done = squid(*arguments, check=False)
        assert done.returncode == 1, arguments
        assert sentence in done.stderr, arguments
        assert "Traceback" not in done.stderr, arguments
    apart = squid_apart(*arguments, check=False)
    assert (apart.returncode, apart.stderr) == (done.returncode, done.stderr)
    assert not Path("no").exists()
    assert same.read_text() == "image_path\nx.png"
    assert [path.name for path in tmp_path.iterdir()] == ["same.csv"]


def test_keep_best_takes_validation_images_of_both_kinds(grids: Path, tmp_path: Path) -> None:
    lines = (grids / "labels.csv").read_text().splitlines()
    (tmp_path / "images").symlink_to(grids / "images")
    normal = [line for line in lines if ",val," not in line or ",0,val," in line]
    (tmp_path / "labels.csv").write_text("\n".join(normal))
    arguments = ("train", *TRAIN, "--data", tmp_path / "labels.csv", "--out", tmp_path / "run")
    done = squid(*arguments, "--keep", "best", check=False)
    assert done.returncode == 1
    assert "--keep is best, which takes normal and anomalous images" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_refused_demo_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "runs" / "demo"
    earlier.mkdir(parents=True)
    for name in ("demo.json", "results.csv"):
        (earlier / name).write_text("kept")
    assert squid("demo", "--device", "gpu", check=False).returncode == 1
    assert {path.read_text() for path in earlier.iterdir()} == {"kept"}


def verbs() -> dict[str, Any]:
    return typer.main.get_command(app).commands


def test_choices_are_those_of_the_library() -> None:
    listed = re.findall(r"\w+", squid("train", "--help").stdout)
    assert {*PRESETS, "auto", *LAYOUTS, "squid", *METHODS, *SCORES} <= set(listed)
    done = squid("train", "--data", "x", "--out", "y", "--preset", "large", check=False)
    assert done.returncode == 2
    assert "'large' is not one of 'zhanglab', 'zhanglab_cpu'" in done.stderr


@pytest.mark.parametrize("verb", verbs())
def test_help_describes_every_option_and_gives_an_example(verb: str) -> None:
    text = " ".join(squid(verb, "--help").stdout.split())
    assert f"Example: squid-fast {verb} " in text
    for option in verbs()[verb].params:
        if option.name != "help":
            assert option.help.endswith("."), option.name
            assert " ".join(option.help.split()) in text, option.name


def test_former_names_of_options_work_with_a_line_of_deprecation(tmp_path: Path) -> None:
    data, gone = ("--data", tmp_path / "gone"), f"{tmp_path / 'gone'} does not exist"
    arguments = ("train", *data, "--out", tmp_path / "run")
    for former, current in (
        (("--averaging", 0.9), "--ema-decay"),
        (("--averaging=0.9",), "--ema-decay"),
        (("--no-graphs",), "--no-cuda-graphs"),
        (("--contaminate", tmp_path, "--rate", 0.1), "--contamination-rate"),
    ):
        done = squid(*arguments, *former, check=False)
        deprecation, error = done.stderr.splitlines()
        assert deprecation.endswith(f" is deprecated; use {current}")
        assert gone in error
    help_of = {verb: squid(verb, "--help").stdout for verb in ("train", "bench")}
    assert "--averaging" not in help_of["train"]
    assert "--batch-size" in help_of["bench"]
