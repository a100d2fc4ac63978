"""The demo: it runs through, keeps its deadline, can be stopped, and does not pile up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
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

quick_demo = partial(run_demo, device="cpu", say=lambda text: None)


@pytest.fixture(scope="module", autouse=True)
def _little_data() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAINING_GRIDS", 64)
        patch.setattr(demo, "HELD_OUT_GRIDS", 30)
        yield


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """A demo that is stopped after three steps."""
    seen: list[Progress] = []
    out = tmp_path_factory.mktemp("demo") / "stopped"
    result = quick_demo(out, 60, report=seen.append, should_stop=lambda: len(seen) >= 2)
    assert seen[-1].step == 3
    return result


def test_what_there_is_at_a_stop_can_be_used(stopped: DemoResult, tmp_path: Path) -> None:
    out = Path(stopped.report).parent
    assert stopped.stopped
    assert stopped.trained_grids == 3 * 16
    assert stopped.seconds >= stopped.training_seconds
    assert "48 grids" in stopped.summary()
    assert stopped.to_json() == json.loads((out / "demo.json").read_text())
    assert (stopped.screened["count"], stopped.screened["errors"]) == (5 * 30, 0)
    assert Path(stopped.report).stat().st_size > 100_000
    assert Scorer.load(out, device="cpu").score_name == "patch_error"
    table = tmp_path / "again.jsonl"
    squid("screen", out, out / "grids", "--out", table, "--device", "cpu", "--workers", 0)
    assert len(table.read_text().splitlines()) == 5 * 30


def test_the_score_that_is_meant_leads_the_table(stopped: DemoResult) -> None:
    assert next(iter(stopped.aurocs)) == stopped.score == "patch_error"
    assert list(stopped.aurocs)[-1] == stopped.to_json()["paper_score"] == "discriminator_instance"
    for by_kind in stopped.aurocs.values():
        assert by_kind.keys() == {"missing", "swapped", "flipped", "foreign"}
        assert all(0 <= value <= 1 for value in by_kind.values())
    (why,) = (x for x in stopped.summary().splitlines() if x.startswith("discriminator_instance"))
    assert "for which minutes of training are too few." in why


def test_it_ends_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_bundle(*_: object, seconds: float, **__: object) -> None:
        raise InterruptedError(seconds)

    drawn = demo.DigitAnatomy.normal

    def draw_slowly(*arguments: object) -> object:
        time.sleep(0.5)
        return drawn(*arguments)

    monkeypatch.setattr(demo.DigitAnatomy, "normal", draw_slowly)
    monkeypatch.setattr(demo, "train_bundle", train_bundle)
    with pytest.raises(InterruptedError) as caught:
        quick_demo(tmp_path, 1.0)
    assert 50 < caught.value.args[0] < 59  # drawing, twice, has used some of them


def test_a_stop_after_training_is_none_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr(demo, "Scorer", SimpleNamespace(load=lambda *_, **__: trained.append(1)))
    monkeypatch.setattr(demo, "_screen", lambda *_: ({"count": 0}, "table", "page"))
    monkeypatch.setattr(demo, "auroc_by_kind", lambda *_: {"patch_error": {"missing": 1.0}})
    result = quick_demo(tmp_path, 0.01, should_stop=lambda: bool(trained))
    assert trained
    assert not result.stopped


def test_the_verb_says_that_it_was_stopped(
    stopped: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "run_demo", lambda *_, **__: stopped)
    done = squid("demo", "--out", tmp_path, check=False)
    assert done.returncode == 130
    assert "patch_error" in done.stdout
    assert "when it was stopped" in done.stdout
    assert json.loads(squid("demo", "--json", "--out", tmp_path, check=False).stdout)["stopped"]


def test_a_folder_that_was_named_is_not_written_over(stopped: DemoResult) -> None:
    with pytest.raises(CheckpointError, match="already holds a run"):
        quick_demo(Path(stopped.report).parent, 1.0)


def test_a_demo_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "demo"
    with demo_folder(wanted) as folder:
        (folder / "grids").mkdir()
        for name in ("checkpoint.pt", "results.csv", "my notes.txt", "grids/normal.png"):
            (folder / name).write_text("first")
        with demo_folder(wanted) as beside:  # while the first is running
            assert (folder, beside) == (wanted, tmp_path / "runs" / "demo-2")
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
