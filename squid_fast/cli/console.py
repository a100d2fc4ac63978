"""What the command line prints: remarks, results and progress; and how it reacts to Ctrl-C."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..training import Progress as TrainingProgress
from ..training.distributed import Processes

_QUIET = not Processes.from_environment().is_main  # of several processes only the first speaks
console = Console(stderr=True, quiet=_QUIET)  # progress and remarks; stdout is for results
_STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_LINE_EVERY = 15.0  # seconds between two lines of progress, without a terminal


def say(text: str, style: str = "") -> None:
    """Print a remark to stderr as it is: paths may hold brackets, and stay on one line."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table to stdout."""
    Console(quiet=_QUIET).print(table)


def print_json(value: Any) -> None:
    """Print a value to stdout as JSON."""
    if not _QUIET:
        print(json.dumps(value, indent=2))


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar, or lines where there is no terminal; it is moved by a call of (done, total)."""
    if not console.is_terminal:
        lines = _Lines()
        yield lambda done, total: lines.say(f"{title}: {done} of {total}", done / max(total, 1))
        return
    columns = (title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Lines:
    """Progress in lines, for output that is no terminal."""

    def __init__(self) -> None:
        self._said = self._started = time.monotonic()
        self._first = self._last = 0.0

    def say(self, text: str, share: float, more: Callable[[], str] = str) -> None:
        """Print text, time gone and left, and ``more()``, unless the last line is too recent."""
        now = time.monotonic()
        if share < self._last or not self._last:  # other work, or its first report
            self._started, self._first = now, share
        self._last = share
        if now - self._said < _LINE_EVERY:
            return
        self._said, gone = now, now - self._started
        done = share - self._first
        left = f", {_minutes(gone * (1 - share) / done)} left" if done > 0 else ""
        say(f"{text}, {_minutes(gone)} gone{left}{more()}")


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _TrainingBar(Progress):
    """A progress bar with the losses on a line below."""

    losses = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.losses:
            yield Text(self.losses, style="dim")


@contextmanager
def training_report() -> Iterator[Callable[[TrainingProgress], None]]:
    """Show training in a bar, or in lines without a terminal; call it with every ``Progress``."""
    if not console.is_terminal:
        lines = _Lines()

        def report_in_lines(state: TrainingProgress) -> None:
            _say_validation(state)
            text = f"{_epoch(state)}, {state.share:.0%}"
            lines.say(text, state.share, lambda: f"; {_losses(state)}")

        yield report_in_lines
        return
    columns = (
        "{task.fields[epoch]}", BarColumn(bar_width=24), "{task.percentage:>3.0f} %",
        TimeElapsedColumn(), "left", TimeRemainingColumn(),
    )  # fmt: skip
    with _TrainingBar(*columns, console=console) as progress:
        task = progress.add_task("", total=1, epoch="", visible=False)
        shown = 0.0

        def report(state: TrainingProgress) -> None:
            nonlocal shown
            _say_validation(state)
            now = time.monotonic()
            if now - shown < 0.5 and state.share < 1:
                return
            shown = now
            progress.losses = _losses(state)
            progress.update(task, completed=state.share, epoch=_epoch(state), visible=True)

        yield report


def _epoch(state: TrainingProgress) -> str:
    return f"epoch {state.epoch + 1}" + (f"/{state.epochs}" if state.epochs else "")


def _losses(state: TrainingProgress) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in state.losses().items())


def _say_validation(state: TrainingProgress) -> None:
    if state.validation is not None:
        figures = "  ".join(f"{name} {value:.3f}" for name, value in state.validation.items())
        say(f"epoch {state.epoch + 1}: {figures}")


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C, SIGTERM and a closed terminal into a request to stop after the current step.

    Gives a function that says whether there was one. A second Ctrl-C stops at once. What the caller
    ignores, as nohup does and a shell for jobs in the background, stays ignored.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            interrupt = before[number]
            if callable(interrupt):
                interrupt(number, frame)
            raise KeyboardInterrupt
        asked = True
        with suppress(RuntimeError):  # the signal came in the middle of another remark
            say("stopping after this step; once more to stop at once")

    before: dict[int, Any] = {
        number: signal.signal(number, ask)
        for number in _STOPPING
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
