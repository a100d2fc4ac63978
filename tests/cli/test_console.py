"""Progress where there is no terminal."""

from __future__ import annotations

import signal

import pytest

pytest.importorskip("rich")

from squid_fast.cli import console
from squid_fast.training import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_training_says_a_line_now_and_then(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = 0

    def losses() -> dict[str, float]:
        nonlocal asked
        asked += 1
        return {"reconstruction": 0.125}

    with console.training_report() as report:
        for step in range(1, 101):
            clock[0] += 1
            validation = {"auroc": 0.75} if step == 50 else None
            report(Progress(step // 50, 2, step, step / 100, losses, validation))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "epoch 1/2, 15%, 0:14 gone, 1:25 left; reconstruction 0.1250"
    assert "epoch 2: auroc 0.750" in lines
    assert len(lines) == 1 + 100 // 15
    assert asked == 100 // 15  # reading losses waits for the device


def test_a_resumed_run_knows_what_is_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.training_report() as report:
        for step in range(50, 71):
            report(Progress(0, None, step, step / 100, dict))
            clock[0] += 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("epoch 1, 65%, 0:15 gone, 0:35 left")


def test_other_work_says_lines_too(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress_bar("reading images") as advance:
        for done in range(0, 8001, 10):
            advance(done, 8000)
            clock[0] += 5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading images: 30 of 8000, 0:10 gone, 1:06:25 left"
    assert any(", 1:00:10 gone, 6:" in line for line in lines)
    assert len(lines) == 4000 // 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_ask_to_stop_unless_the_caller_ignores_them(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with console.stop_on_signals() as should_stop:
            signal.raise_signal(number)
            assert not should_stop()
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, before)
        with console.stop_on_signals() as should_stop:
            assert not should_stop()
            signal.raise_signal(number)
            assert should_stop()
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, before)
