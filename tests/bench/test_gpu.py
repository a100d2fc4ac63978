"""The stages for a machine with a GPU, on one without."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import COMMANDS, main
from bench.gpu import contact, levers, stages
from bench.gpu.__main__ import PROGRAMS
from bench.gpu.stages import Step
from bench.gpu.trials import Trials
from squid_fast import kernels
from squid_fast.inference import model
from squid_fast.kernels import dispatch

CPU = torch.device("cpu")


def test_it_says_that_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(["gpu", "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_names_those_that_there_are() -> None:
    with pytest.raises(SystemExit, match="no stage lever; there are contact, levers, steps"):
        main(["gpu", "lever"])


def test_stages_go_on_after_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "TESTS", stages.TESTS | {"tests": ["tests/kernels/test_golden.py"]})
    monkeypatch.setenv("BENCH_COMMIT", "1234567")
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_it() -> None:\n    assert 1 + 1 == 3\n")
    options = ["--device=cpu", f"--output={tmp_path}", "--tests", "tests/kernels/absent.py"]
    with pytest.raises(SystemExit) as ended:
        main(["gpu", "tests", "operations", *options])
    assert ended.value.code == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    codes = {step["step"]: step["exit_code"] for step in summary["steps"]}
    assert codes == {"tests: found": 0, "tests": 4, "operations": 0}
    assert summary["torch"] == torch.__version__
    assert "FAILED: exit code 4" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "micro_cpu.json").read_text())["rows"]) == 6
    assert "absent.py" in (tmp_path / "log.txt").read_text()
    # What has passed does not run again, and what it found stays.
    (tmp_path / "micro_cpu.json").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["gpu", "tests", "operations", "--resume", *options[:2], "--tests", str(failing)])
    assert ended.value.code == 1
    assert not (tmp_path / "micro_cpu.json").exists()
    rows = json.loads((tmp_path / "summary.json").read_text())["steps"]
    steps = {row["step"]: row for row in rows}
    assert steps["operations"]["exit_code"] == 0
    assert steps["tests"]["exit_code"] == 1
    assert steps["tests"]["failed"][0].endswith("test_failing.py::test_it")
    log = (tmp_path / "log.txt").read_text()
    assert log.count("== tests\n") == 2
    assert log.count("== operations\n") == 1


def test_a_step_that_takes_too_long_is_ended_with_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_GRACE", 0.5)
    child = f"import time; time.sleep(3); open({str(tmp_path / 'outlived')!r}, 'w')"
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('begun', flush=True); "
        "time.sleep(60)"
    )
    quick = [sys.executable, "-c", "print('done')"]
    step = Step("slow", 1.0, [quick, [sys.executable, "-c", deaf]])
    started = time.monotonic()
    assert stages.run(step, 60, tmp_path / "log.txt") == 124
    assert time.monotonic() - started < 20
    assert sorted((tmp_path / "log.txt").read_text().split("\n")) == [
        "",
        "== slow",
        "begun",
        "done",
    ]
    time.sleep(max(0, 4 - (time.monotonic() - started)))
    assert not (tmp_path / "outlived").exists()


def test_tests_that_failed_are_named_whatever_ended_the_run(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        "== tests\ntests/a.py::test_old FAILED [ 50%]\n== sanitizer\n== tests\n"
        "[gw1] [  3%] PASSED tests/a.py::test_good[1-2] \n"
        "[gw0] [  5%] FAILED tests/a.py::test_bad[x y-FAILED] \n"
        "tests/b.py::test_worse[one two] FAILED                       [ 50%]\n"
        "tests/b.py::test_broken ERROR [100%]\n"
        "FAILED tests/a.py::test_bad[x y-FAILED] - AssertionError: it is - not\n"
    )
    found = stages.failed_tests(log, "tests")
    assert found == [
        "tests/a.py::test_bad[x y-FAILED]",
        "tests/b.py::test_broken",
        "tests/b.py::test_worse[one two]",
    ]


def test_a_stage_without_time_is_said_to_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gpu", "contact", "--device=cpu", f"--output={tmp_path}", "--limit=1"])
    assert ended.value.code == 1
    assert "FAILED: out of time" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert row["exit_code"] == 124


def test_a_rehearsal_has_what_a_bare_gpu_machine_has(tmp_path: Path) -> None:
    lacking = "import importlib.util as u; assert u.find_spec('pydicom') is None; import {}"
    for name in ("pydicom", "pydantic", "ray"):
        command = [sys.executable, "-c", lacking.format(name)]
        step = Step(name, 60, [command], stages.rehearsed())
        assert stages.run(step, 60, tmp_path / "log.txt") == 1
        assert f"import of {name} halted" in (tmp_path / "log.txt").read_text()
    step = Step("torch", 60, [[sys.executable, "-c", "import torch, einops"]], stages.rehearsed())
    assert stages.run(step, 60, tmp_path / "log.txt") == 0


def test_no_stage_takes_more_than_five_minutes(tmp_path: Path) -> None:
    options = SimpleNamespace(device="cuda", output=tmp_path, tests=None)
    for stage in stages.STAGES:
        assert sum(step.seconds for step in stages.steps_of(stage, options)) <= 300, stage


def test_every_stage_names_programs_that_there_are(tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        options = SimpleNamespace(device=device, output=tmp_path, tests=None)
        steps = [step for stage in stages.STAGES for step in stages.steps_of(stage, options)]
        assert len({step.name for step in steps}) == len(steps)
        for python, flag, module, program, *_ in (x for step in steps for x in step.commands):
            assert (python, flag) == (sys.executable, "-m")
            assert module in ("pytest", "bench", "bench.gpu")
            assert module != "bench" or program in COMMANDS
            assert module != "bench.gpu" or program in PROGRAMS
    for tests in stages.TESTS.values():
        assert all((stages.ROOT / path).exists() for path in tests)


@pytest.mark.parametrize("name", ["projected_lookup", "hard_shrinkage", "masked_shortcut"])
def test_contact_finds_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(x for x in contact.cases(CPU) if x.startswith(name) and "float32" in x)
    row = contact.check(CPU, case)
    assert row["same_bits"]
    assert row["error"] < 1e-5
    made = contact.problem

    def worse(*arguments: object) -> object:
        problem = made(*arguments)
        ours, calls = problem.ours, iter(range(9))
        problem.ours = lambda *inputs: ours(*inputs) * (1.1 + next(calls))
        return problem

    monkeypatch.setattr(contact, "problem", worse)
    row = contact.check(CPU, case)
    assert not row["same_bits"]
    assert "problem" in row


def test_trials_keep_what_they_found_when_one_fails(tmp_path: Path) -> None:
    options = SimpleNamespace(device="cpu", output=tmp_path, seconds=60.0)
    trials = Trials("some", options)
    trials.attempt("a", lambda x: {16: x}, 2.5)
    trials.attempt("b", lambda: 1 / 0)
    trials.attempt("c", float, "nan")  # which JSON cannot say
    trials.attempt("d", lambda: 4)
    late = Trials("late", SimpleNamespace(device="cpu", output=tmp_path, seconds=1.0))
    late.attempt("e", lambda: 5)
    found = json.loads((tmp_path / "some_cpu.json").read_text())
    assert (found["a"], found["d"]) == ({"16": 2.5}, 4)
    assert found["b"] == "failed: ZeroDivisionError: division by zero"
    assert found["c"].startswith("failed: ValueError")
    assert trials.failures == ["b", "c"]
    skipped = json.loads((tmp_path / "late_cpu.json").read_text())["e"]
    assert skipped == "skipped: the time was up"


def test_what_scoring_asks_for_is_found_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trials("levers", SimpleNamespace(device="cpu", output=tmp_path, seconds=60.0))
    measured = levers.Levers(run)
    pieces = measured.pieces()
    assert pieces[0] == levers.EPILOGUES
    assert {"memory_lookup", "neighbourhood_attention"} <= set(pieces)
    assert "hard_shrinkage" not in pieces  # which this network does not have
    logits = torch.zeros(2, 3)
    with kernels.use("interpret"), monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        assert dispatch.serves_hard_shrinkage(logits)
        with levers.replaced(levers.kernel_names()):
            assert not dispatch.serves_hard_shrinkage(logits)
            assert not dispatch.serves_gumbel_shrinkage(logits, top_k=2)
        assert dispatch.serves_hard_shrinkage(logits)
    fused = []
    monkeypatch.setattr(model, "has_cudnn", lambda device: True)
    monkeypatch.setattr(model, "use_cudnn", fused.append)
    measured.network()
    assert len(fused) == 1
    with levers.replaced([levers.EPILOGUES]):
        measured.network()
    assert len(fused) == 1
