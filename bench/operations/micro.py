"""Time of every operation: squid_fast beside the reference, eager and compiled.

Every contender is verified against the reference in float64 before it is timed. Figures go to
``micro_cpu.json``, or ``micro_cuda.json`` on a GPU; rows of an earlier run stay in the file if
device, versions and commit are the same. ``pytest --benchmark`` times the same by pytest-benchmark.

On a CPU that does other work too, times mean little, but ratios of one run do.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squid_fast.utils.devices import choose_device

from ..arguments import add_device, add_option, add_output, thread_count
from ..measurements import ROOT, Results
from . import timing
from .cases import CONTENDERS, OPERATIONS, SELECTIONS, Case, schedule
from .problems import Problem, call_of, function_of, problem
from .roofline import Ceilings, floors, measure, work_of
from .verify import verify

Row = dict[str, Any]


class Timings:
    """Rows of a run, and their file ``micro_<device>.json`` in ``folder``."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.results = Results(folder / f"micro_{device.type}.json", device)
        self.results.resume()
        known = self.results.figures
        self.rows: dict[str, Row] = {_key(row): row for row in known.get("rows", [])}
        self.failures: dict[str, str] = known.get("failures", {})
        ceilings = known.get("ceilings")
        self._ceilings: Ceilings | None = Ceilings(**ceilings) if ceilings else None

    @property
    def ceilings(self) -> Ceilings:
        """Ceilings of the device, which are measured when they are first needed."""
        if self._ceilings is None:
            self._ceilings = measure(self.device)
        return self._ceilings

    def add(self, case: Case, contender: str, error: float, timed: timing.Timing) -> Row:
        """Add a measurement to the file: its row."""
        row: Row = {
            "operation": case.operation,
            "direction": case.direction,
            "dtype": case.dtype,
            "sizes": dict(case.sizes),
            "contender": contender,
            "median_us": _rounded(timed.median * 1e6),
            "iqr_us": _rounded(timed.spread * 1e6),
            "error": _rounded(error, 2),
        }
        if timed.cold:
            cold = timing.Timing(timed.cold, []).median
            floor = self.ceilings.floor(work_of(case), case.dtype)
            row |= {
                "cold_us": _rounded(cold * 1e6),
                "floor_us": _rounded(floor * 1e6),
                # The floor counts bytes of the device memory, so the cold time is held against it.
                "fraction_of_floor": _rounded(floor / cold, 3) if cold else None,
                "gb_per_s": _rounded(work_of(case).bytes / timed.median / 1e9),
                "tflops": _rounded(work_of(case).flops / timed.median / 1e12),
            }
        key = _key(row)
        self.rows[key] = row
        self.failures.pop(key, None)
        self._compare()
        self.write()
        return row

    def fail(self, case: Case, contender: str, error: BaseException | str) -> None:
        """Note why there is no row, in place of that of an earlier run."""
        key = f"{case.group} {contender}"
        if isinstance(error, BaseException):
            error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.rows.pop(key, None)
        self.failures[key] = error
        self.write()

    def _compare(self) -> None:
        for row in self.rows.values():
            eager = self.rows.get(_key(row | {"contender": "eager"}))
            if eager is not None:
                row["ratio_to_eager"] = _rounded(eager["median_us"] / row["median_us"], 3)

    def write(self) -> None:
        """Write the file."""
        self.results.figures = {
            "ceilings": self._ceilings and asdict(self._ceilings),
            "failures": dict(sorted(self.failures.items())),
            "rows": sorted(self.rows.values(), key=_order),
        }
        self.results.write()


def _rounded(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")


def _key(row: Row) -> str:
    case = Case(row["operation"], row["direction"], row["dtype"], tuple(row["sizes"].items()))
    return f"{case.group} {row['contender']}"


def _order(row: Row) -> tuple[Any, ...]:
    """Operations and contenders in the order of their lists, sizes by number."""
    return (
        OPERATIONS.index(row["operation"]),
        row["direction"],
        row["dtype"],
        [str(x).zfill(9) for x in row["sizes"].values()],
        CONTENDERS.index(row["contender"]),
    )


class Runner:
    """Prepares contenders one after the other, keeping the inputs while the case is the same."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._case: Case | None = None
        self._problem: Problem | None = None

    def prepare(self, case: Case, contender: str) -> tuple[Callable[[], list[Tensor]], float]:
        """The call to time, and its error.

        Raises:
            WrongResultError: The contender disagrees with the reference.
        """
        if self._problem is None or self._case != case:
            self._problem = None  # before the next one takes its memory
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._problem, self._case = problem(case, self.device), case
        call = call_of(case, self._problem, function_of(self._problem, contender))
        return call, verify(case, self._problem, call)


def run(
    device: torch.device,
    selection: str,
    timings: Timings | None,
    operations: tuple[str, ...] = (),
    seconds: float = float("inf"),
) -> int:
    """Verify, and with ``timings`` time, what is asked for; the number of failures."""
    started, failed = time.monotonic(), 0
    runner = Runner(device)
    for case, contender in schedule(device, selection):
        if operations and case.operation not in operations:
            continue
        name = f"{case.group} {contender}"
        if time.monotonic() - started > seconds:
            if timings:
                timings.fail(case, contender, "skipped: the time was up")
            continue
        try:
            call, error = runner.prepare(case, contender)
            if timings is None:
                print(f"{name}: correct to {error:.1e}", flush=True)
                continue
            timed = timing.on_cuda(call) if device.type == "cuda" else timing.on_cpu(call)
        except Exception as error:  # whatever it is, the others go on
            failed += 1
            print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
            if timings:
                timings.fail(case, contender, error)
        else:
            row = timings.add(case, contender, error, timed)
            print(f"{name}: {row['median_us']} µs", flush=True)
    return failed


def add_arguments(parser: ArgumentParser) -> None:
    help = "Operation to time, which may be given more than once. Default: all."
    parser.add_argument("--operation", action="append", choices=OPERATIONS, default=[], help=help)
    help = "Sizes: tiny ones for a trial, core ones for minutes, or all, which takes longer"
    add_option(parser, "--sizes", "core", help, choices=SELECTIONS)
    add_option(parser, "--seconds", float("inf"), "Time after which nothing more is begun")
    what = parser.add_mutually_exclusive_group()
    help = "Compilation and verification alone, without times."
    what.add_argument("--check", action="store_true", help=help)
    help = "The least time that each operation can take on this device, in place of the times."
    what.add_argument("--floors", action="store_true", help=help)
    add_device(parser)
    add_output(parser, ROOT / ".benchmarks")
    parser.set_defaults(run=main)


def main(options: Namespace) -> None:
    """Run the benchmarks without pytest; exit with 1 if a contender failed."""
    torch.set_num_threads(thread_count())
    device = choose_device(options.device)
    if options.floors:
        print(floors(device, options.sizes))
        return
    timings = None if options.check else Timings(options.output, device)
    operations = tuple(options.operation)
    sys.exit(min(run(device, options.sizes, timings, operations, options.seconds), 1))
