"""What people see of the command line: tables, progress bars, and how a run is stopped."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..experiments.ablation import SHOWN, cell, summarised
from ..inference.scores import PAPER_SCORE
from ..metrics import Evaluation
from ..training import Progress as TrainingProgress
from ..training.distributed import Processes

_QUIET = not Processes.found().is_main  # of several processes only the first speaks
console = Console(stderr=True, quiet=_QUIET)  # progress and remarks; stdout is for results
_LINE_EVERY = 15.0  # seconds, where progress is told in lines


def say(text: str, style: str = "") -> None:
    """A remark to stderr, as it is: paths may hold brackets, and are not broken over lines."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """To stdout, as a result."""
    Console(quiet=_QUIET).print(table)


def print_json(value: Any) -> None:
    """To stdout, as a result."""
    if not _QUIET:
        json.dump(value, sys.stdout, indent=2)
        print()


def evaluation_table(evaluations: dict[str, Evaluation]) -> Table:
    """One row for each score."""
    first = next(iter(evaluations.values()))
    rate = first.false_positive_rate
    table = Table(
        title=f"{first.n_normal} normal, {first.n_anomalous} anomalous images",
        caption="acc*, F1*: at the threshold that is best on these very labels, the paper's "
        "protocol. sens., spec.: at the threshold set on normal validation images"
        + (f" for {rate:.0%} false positives." if rate else "."),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("score", no_wrap=True)
    for name in ("AUROC", "95 %", "AUPR", "acc*", "F1*", "sens.", "spec."):
        table.add_column(name, justify="right", no_wrap=True)
    for name, e in evaluations.items():
        paper, own = e.paper_best_test_accuracy, e.calibrated
        low, high = e.auroc_interval
        figures = [e.auprc, paper.accuracy, paper.f1]
        figures += [own.sensitivity, own.specificity] if own else []
        cells = [f"{value:.3f}" for value in figures]
        table.add_row(name, f"{e.auroc:.3f}", f"{low:.2f}-{high:.2f}", *cells)
    return table


def demo_table(aurocs: dict[str, dict[str, float]], score: str) -> Table:
    """AUROC of every score for every kind of anomaly; ``score`` in bold."""
    table = Table(title="AUROC on unseen grids, against normal ones", box=SIMPLE_HEAD)
    table.add_column("score")
    for kind in next(iter(aurocs.values())):
        table.add_column(kind, justify="right")
    for name, by_kind in aurocs.items():
        label = f"{name} (the paper's)" if name == PAPER_SCORE else name
        style = "bold" if name == score else ""
        table.add_row(label, *(f"{value:.3f}" for value in by_kind.values()), style=style)
    return table


def ablation_table(results: dict[str, Any]) -> Table:
    """AUROC of every variant, and the difference to the full SQUID."""
    table = Table(
        title=f"{results['settings']['preset']} on {results['settings']['data']}",
        caption="AUROC, mean over kinds of anomaly and seeds, ± deviation over seeds; in brackets "
        "the difference to the full SQUID.",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("variant", no_wrap=True)
    for score in SHOWN:
        table.add_column(score, justify="right")
    for row in summarised(results, SHOWN):
        table.add_row(row["variant"], *(cell(row, score) for score in SHOWN))
    return table


def bench_table(figures: dict[str, Any]) -> Table:
    """The published way beside squid_fast, from the figures of a `Benchmark`."""
    share = next(r["share_of_scorer"] for r in figures["screening"].values() if len(r) > 4)
    threads, rounds = figures["threads"], figures["rounds"]
    table = Table(
        title=f"{figures['device']}, {threads} thread{'s' * (threads != 1)}: {figures['model']}",
        caption=f"Medians of {rounds} rounds, of files {min(rounds, 3)}, in which all take turns. "
        "×: how many times as fast as the published way; × =: at equal batch size. "
        f"From files to rows, squid_fast reaches {share:.0%} of its scorer's own rate. Threads "
        f"wait for one another as {figures['waiting']} has it; a Python program of your own does "
        "so too if it calls squid_fast.utils.threads.limit_spinning() before torch is imported.",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("")
    for name in ("images/s", "ms/image", "×", "× ="):
        table.add_column(name, justify="right", no_wrap=True)
    for part, title in (("evaluation", "model only"), ("screening", "end to end, from files")):
        table.add_row(title, style="bold")
        for name, row in figures[part].items():
            equal = row.get("ratio_at_equal_batch")
            table.add_row(
                name,
                f"{row['images_per_second']:,.1f}",
                f"{row['milliseconds']:,.2f}",
                f"{row['ratio']:.2f}",
                "" if equal is None else f"{equal:.2f}",
            )
        table.add_section()
    return table


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is moved by calls with (done, total) and vanishes at the end.

    Without a terminal, a line now and then.
    """
    if not console.is_terminal:
        lines = _Lines()
        yield lambda done, total: lines.say(f"{title}: {done} of {total}", done / max(total, 1))
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Lines:
    """Progress where there is no terminal to draw a bar on: a line every few seconds."""

    def __init__(self) -> None:
        self._said = self._started = time.monotonic()
        self._first = self._last = 0.0

    def say(self, text: str, share: float, more: Callable[[], str] = str) -> None:
        """The text, with the time gone and left by the share that is done, if it is time to.

        Args:
            more: makes what stands behind it, where that takes time to make.
        """
        now = time.monotonic()
        if share < self._last or not self._last:  # other work, or the first that is known of this
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
    """A bar with the losses on a line of their own."""

    losses = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.losses:
            yield Text(self.losses, style="dim")


@contextmanager
def training_report() -> Iterator[Callable[[TrainingProgress], None]]:
    """A progress bar with losses and time left; validation AUROCs become lines above it.

    Without a terminal, a line now and then.
    """
    if not console.is_terminal:
        lines = _Lines()

        def report_in_lines(state: TrainingProgress) -> None:
            _say_validation(state)
            text = f"{_epoch(state)}, {state.share:.0%}"
            lines.say(text, state.share, lambda: f"; {_losses(state)}")

        yield report_in_lines
        return
    columns = (
        TextColumn("{task.fields[epoch]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
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
    """Ctrl-C or a termination asks for a stop after the step; a second Ctrl-C is at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        say("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
