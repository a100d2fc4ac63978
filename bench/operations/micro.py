"""Microbenchmarks: every operation, reference eager and compiled beside squid_fast.

``pytest --benchmark`` runs them through pytest-benchmark; ``python -m bench operations`` runs the
same cases by itself, where pytest-benchmark is missing. Both verify a contender against the float64
reference before they time it, and both write ``micro_cpu.json`` or ``micro_cuda.json``: device,
versions, commit, and a row for each contender. Rows of another run stay in the file if device,
versions and commit are the same.

Times on a shared CPU mean little by themselves; ratios in one run do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squid_fast.utils.devices import choose_device

from ..measurements import describe
from . import timing
from .cases import CONTENDERS, OPERATIONS, Case, schedule
from .problems import Problem, call_of, function_of, problem
from .roofline import Ceilings, measure, work_of
from .verify import verify

Row = dict[str, Any]


def pin_threads() -> None:
    """As many threads as the environment says, or as this process may use."""
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or able or 1))


class Results:
    """Rows of a run, and their file ``micro_<device>.json`` in ``folder``."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.path = folder / f"micro_{device.type}.json"
        self.device = device
        self.header: dict[str, Any] = describe(device)
        self.rows: dict[str, Row] = {}
        self.failures: dict[str, str] = {}
        self._ceilings: Ceilings | None = None
        self._read()

    def _read(self) -> None:
        if not self.path.is_file():
            return
        found = json.loads(self.path.read_text())
        if any(found.get(key) != self.header[key] for key in self.header if key != "date"):
            return
        self.rows = {_key(row): row for row in found["rows"]}
        self.failures = found["failures"]
        if found["ceilings"]:
            self._ceilings = Ceilings(**found["ceilings"])

    @property
    def ceilings(self) -> Ceilings:
        """Measured when they are first needed."""
        if self._ceilings is None:
            self._ceilings = measure(self.device)
        return self._ceilings

    def add(self, case: Case, contender: str, error: float, timed: timing.Timing) -> Row:
        """Take a measurement into the file; the row."""
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
        """Note why there is no row; one of an earlier run goes."""
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
        """Write the file anew: the header, then a line for each row."""
        head = self.header | {"ceilings": self._ceilings and asdict(self._ceilings)}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        failures = dict(sorted(self.failures.items()))
        lines.append(f' "failures": {json.dumps(failures, indent=2)}')
        rows = ",\n".join(f"  {json.dumps(r)}" for r in sorted(self.rows.values(), key=_order))
        lines.append(f' "rows": [\n{rows}\n ]')
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _rounded(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")


def _key(row: Row) -> str:
    sizes = tuple(row["sizes"].items())
    return (
        f"{Case(row['operation'], row['direction'], row['dtype'], sizes).group} "
        + (row["contender"])
    )


def _order(row: Row) -> tuple[Any, ...]:
    """Operations, contenders in their own order; the rest by the alphabet, numbers by size."""
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
            WrongResultError: it is not right.
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
    results: Results | None,
    operations: tuple[str, ...] = (),
    seconds: float = float("inf"),
) -> int:
    """Verify, and with ``results`` time, what is asked for; the number of failures."""
    started, failed = time.monotonic(), 0
    runner = Runner(device)
    for case, contender in schedule(device, selection):
        if operations and case.operation not in operations:
            continue
        name = f"{case.group} {contender}"
        if time.monotonic() - started > seconds:
            if results:
                results.fail(case, contender, "skipped: the time was up")
            continue
        try:
            call, error = runner.prepare(case, contender)
            if results is None:
                print(f"{name}: right to {error:.1e}", flush=True)
                continue
            timed = timing.on_cuda(call) if device.type == "cuda" else timing.on_cpu(call)
        except Exception as error:  # whatever it is, the others go on
            failed += 1
            print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
            if results:
                results.fail(case, contender, error)
        else:
            row = results.add(case, contender, error, timed)
            print(f"{name}: {row['median_us']} µs", flush=True)
    return failed


def main() -> None:
    """Run the benchmarks without pytest."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device")
    parser.add_argument("--sizes", choices=("tiny", "core", "all"), default="core")
    parser.add_argument("--operation", action="append", choices=OPERATIONS, default=[])
    parser.add_argument("--output", type=Path, default=Path(".benchmarks"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--check", action="store_true", help="verify and compile, time nothing")
    options = parser.parse_args()
    pin_threads()
    device = choose_device(options.device)
    results = None if options.check else Results(options.output, device)
    operations = tuple(options.operation)
    sys.exit(min(run(device, options.sizes, results, operations, options.seconds), 1))


if __name__ == "__main__":
    main()
