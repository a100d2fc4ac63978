"""Time of every operation: squid_fast beside the reference, eager and compiled.

Every contender is verified against the reference in float64 before it is timed. Figures go to
``micro_cpu.json``, or ``micro_cuda.json`` on a GPU; rows of an earlier run stay in the file if
device, versions and commit are the same. ``pytest --benchmark`` makes the same measurements.

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


class OutOfTimeError(Exception):
    """The time of a run was up before a contender was begun."""


class Timings:
    """Verified and timed contenders, and their file ``micro_<device>.json``.

    Args:
        folder: Where the file lies.
        seconds: Time after which nothing more is begun.
    """

    def __init__(self, device: torch.device, folder: Path, seconds: float = float("inf")) -> None:
        self.device, self._end = device, time.monotonic() + seconds
        self._case: Case | None = None
        self._problem: Problem | None = None
        self.results = Results(folder / f"micro_{device.type}.json", device)
        self.results.resume()
        known = self.results.figures
        self.rows: dict[str, Row] = {_key(row): row for row in known.get("rows", [])}
        self.failures: dict[str, str] = known.get("failures", {})
        self._ceilings = Ceilings(**known["ceilings"]) if known.get("ceilings") else None

    def prepare(self, case: Case, contender: str) -> tuple[Callable[[], list[Tensor]], float]:
        """The call to time, and its error; inputs are kept while the case is the same.

        Raises:
            OutOfTimeError: The time of the run is up.
            WrongResultError: The contender disagrees with the reference.
        """
        if time.monotonic() > self._end:
            raise OutOfTimeError("skipped: the time was up")
        if self._problem is None or self._case != case:
            self._problem = None  # before the next one takes its memory
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._problem, self._case = problem(case, self.device), case
        call = call_of(case, self._problem, function_of(self._problem, contender))
        return call, verify(case, self._problem, call)

    def measure(self, case: Case, contender: str) -> tuple[Row, list[float]]:
        """Verify and time a contender, and write what came of it: the row, and warm seconds."""
        try:
            call, error = self.prepare(case, contender)
            timed = timing.on_cuda(call) if self.device.type == "cuda" else timing.on_cpu(call)
        except Exception as failure:
            self.fail(case, contender, failure)
            raise
        return self.add(case, contender, error, timed), timed.warm

    def add(self, case: Case, contender: str, error: float, timed: timing.Timing) -> Row:
        """Add a measurement to the file: its row."""
        row: Row = asdict(case) | {
            "sizes": dict(case.sizes),
            "contender": contender,
            "median_us": _rounded(timed.median * 1e6),
            "iqr_us": _rounded(timed.spread * 1e6),
            "error": _rounded(error, 2),
        }
        if timed.cold:
            if self._ceilings is None:
                self._ceilings = measure(self.device)
            work, cold = work_of(case), timing.Timing(timed.cold, []).median
            floor = self._ceilings.floor(work, case.unit)
            row |= {
                "cold_us": _rounded(cold * 1e6),
                "floor_us": _rounded(floor * 1e6),
                # The floor counts bytes of the device memory, so the cold time is held against it.
                "fraction_of_floor": _rounded(floor / cold, 3) if cold else None,
                "gb_per_s": _rounded(work.bytes / timed.median / 1e9),
                "tflops": _rounded(work.flops / timed.median / 1e12),
            }
        self.rows[_key(row)] = row
        self.failures.pop(_key(row), None)
        for other in self.rows.values():
            if eager := self.rows.get(_key(other | {"contender": "eager"})):
                other["ratio_to_eager"] = _rounded(eager["median_us"] / other["median_us"], 3)
        self._write()
        return row

    def fail(self, case: Case, contender: str, error: Exception) -> None:
        """Note why there is no row, in place of that of an earlier run."""
        key = f"{case.group} {contender}"
        reason = (str(error).splitlines() or [""])[0]
        late = isinstance(error, OutOfTimeError)
        self.failures[key] = reason if late else f"{type(error).__name__}: {reason}"
        self.rows.pop(key, None)
        self._write()

    def _write(self) -> None:
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
    sizes = [str(x).zfill(9) for x in row["sizes"].values()]
    operation, contender = OPERATIONS.index(row["operation"]), CONTENDERS.index(row["contender"])
    return operation, row["direction"], row["dtype"], sizes, contender


def run(timings: Timings, plan: list[tuple[Case, str]], check: bool = False) -> int:
    """Time, or with ``check`` only verify, what is planned: the number of failures."""
    failed = 0
    for case, contender in plan:
        name = f"{case.group} {contender}"
        try:
            if check:
                _, error = timings.prepare(case, contender)
                said = f"correct to {error:.1e}"
            else:
                said = f"{timings.measure(case, contender)[0]['median_us']} µs"
        except OutOfTimeError:
            continue
        except Exception as error:  # whatever it is, the others go on
            failed += 1
            said = f"FAILED, {type(error).__name__}: {error}"
        print(f"{name}: {said}", flush=True)
    return failed


def add_arguments(parser: ArgumentParser) -> None:
    help = "Operation to time, which may be given more than once. Default: all."
    parser.add_argument("--operation", action="append", choices=OPERATIONS, help=help)
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


def main(options: Namespace) -> None:
    """Run the benchmarks without pytest; exit with 1 if a contender failed."""
    torch.set_num_threads(thread_count())
    device = choose_device(options.device)
    if options.floors:
        print(floors(device, options.sizes))
        return
    plan = schedule(device, options.sizes, options.operation or OPERATIONS)
    timings = Timings(device, options.output, options.seconds)
    sys.exit(bool(run(timings, plan, options.check)))
