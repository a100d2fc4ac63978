"""The demo: it runs through, keeps its deadline, can be stopped, and does not pile up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from squid_fast import Scorer
from squid_fast.cli import models
from squid_fast.experiments import demo
from squid_fast.experiments.demo import DemoResult, demo_folder, run_demo
from squid_fast.training import CheckpointError, Progress
from tests.command_line import squid

pytest.importorskip("typer")
pytest.importorskip("lightning_fabric")

KINDS = {"missing", "swapped", "flipped", "foreign"}


@pytest.fixture(autouse=True)
def _little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAINING_GRIDS", 64)
    monkeypatch.setattr(demo, "HELD_OUT_GRIDS", 30)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    """A demo that is stopped after three steps."""
    out = tmp_path_factory.mktemp("demo") / "stopped"
    seen: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAINING_GRIDS", 64)
        patch.setattr(demo, "HELD_OUT_GRIDS", 30)
        result = run_demo(
            out,
            60,
            device="cpu",
            say=lambda text: None,
            report=seen.append,
            should_stop=lambda: len(seen) >= 2,
        )
    assert seen[-1].step == 3
    return out, result


def test_what_there_is_at_a_stop_is_reported_and_usable(
    stopped: tuple[Path, DemoResult], tmp_path: Path
) -> None:
    out, result = stopped
    assert result.stopped
    assert result.trained_grids == 3 * 16
    assert "48 grids" in result.summary()
    assert "when it was stopped" in result.summary()
    assert result.to_json() == json.loads((out / "demo.json").read_text())
    assert result.screened["count"] == 5 * 30
    assert result.screened["errors"] == 0
    assert Path(result.report).stat().st_size > 100_000
    assert Scorer.load(out, device="cpu").score_name == "patch_error"
    table = tmp_path / "again.jsonl"
    squid("screen", out, out / "grids", "--out", table, "--device", "cpu", "--workers", 0)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(rows) == 5 * 30


def test_the_score_that_is_meant_leads_the_table(stopped: tuple[Path, DemoResult]) -> None:
    _, result = stopped
    assert next(iter(result.aurocs)) == result.score == "patch_error"
    assert list(result.aurocs)[-1] == result.to_json()["paper_score"] == "discriminator_instance"
    for by_kind in result.aurocs.values():
        assert by_kind.keys() == KINDS
        assert all(0 <= value <= 1 for value in by_kind.values())
    (why,) = (x for x in result.summary().splitlines() if x.startswith("discriminator_instance"))
    assert "for which minutes of training are too few." in why


def test_it_ends_by_the_clock(
    stopped: tuple[Path, DemoResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, result = stopped
    given = {}

    def train_bundle(*_: object, seconds: float, **__: object) -> None:
        given["seconds"] = seconds
        raise InterruptedError

    drawn = demo.DigitAnatomy.normal

    def draw_slowly(*arguments: object) -> object:
        time.sleep(0.5)
        return drawn(*arguments)

    monkeypatch.setattr(demo.DigitAnatomy, "normal", draw_slowly)
    monkeypatch.setattr(demo, "train_bundle", train_bundle)
    with pytest.raises(InterruptedError):
        run_demo(tmp_path, 1.0, say=lambda text: None)
    assert 50 < given["seconds"] < 59  # drawing, twice, has used some of them
    assert result.seconds >= result.training_seconds


def test_a_stop_after_training_is_none_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr(demo, "Scorer", SimpleNamespace(load=lambda *_, **__: trained.append(1)))
    monkeypatch.setattr(demo, "_screen", lambda *_: ({"count": 0}, "table", "page"))
    monkeypatch.setattr(demo, "auroc_by_kind", lambda *_: {"patch_error": {"missing": 1.0}})
    result = run_demo(
        tmp_path, 0.01, device="cpu", say=lambda text: None, should_stop=lambda: bool(trained)
    )
    assert trained
    assert not result.stopped


def test_the_verb_says_that_it_was_stopped(
    stopped: tuple[Path, DemoResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, result = stopped
    monkeypatch.setattr(models, "run_demo", lambda *_, **__: result)
    done = squid("demo", "--out", tmp_path, check=False)
    assert done.returncode == 130
    assert "patch_error" in done.stdout
    assert "when it was stopped" in done.stdout
    assert json.loads(squid("demo", "--json", "--out", tmp_path, check=False).stdout)["stopped"]


def test_a_folder_that_was_named_is_not_written_over(stopped: tuple[Path, DemoResult]) -> None:
    with pytest.raises(CheckpointError, match="already holds a run"):
        run_demo(stopped[0], 1.0, device="cpu", say=lambda text: None)


def test_a_demo_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "demo"
    with demo_folder(wanted) as folder:
        assert folder == wanted
        (folder / "grids").mkdir()
        for name in ("checkpoint.pt", "results.csv", "my notes.txt", "grids/normal.png"):
            (folder / name).write_text("first")
        with demo_folder(wanted) as beside:  # while the first is running
            assert beside == tmp_path / "runs" / "demo-2"
    with demo_folder(wanted) as folder:
        assert folder == wanted
        assert {path.name for path in folder.iterdir()} == {"demo.json", "my notes.txt"}
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    wanted = tmp_path / "demo"
    wanted.mkdir()
    (wanted / "checkpoint.pt").write_text("mine")
    with demo_folder(wanted) as folder:
        assert folder == tmp_path / "demo-2"
    assert (wanted / "checkpoint.pt").read_text() == "mine"
