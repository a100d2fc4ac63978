"""Tables of the operations: their times beside the reference, and their floors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .. import measurements
from ..markdown import of_file, table
from .cases import cases
from .roofline import Ceilings, work_of

# The vendor's data sheet of the H100 SXM: 3.35 TB/s, 989 TFLOP/s dense in bfloat16, and a third of
# 494 TFLOP/s in TF32 for float32.
H100 = Ceilings(bytes_per_s=3.35e12, bfloat16=989e12, float32=494e12 / 3)


def _title(operation: str, direction: str) -> str:
    return f"{operation}, {direction.replace('_', ' + ')}".replace("_", " ")


def _microseconds(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def micro(figures: dict[str, Any], cuda: bool = False) -> str:
    """Every operation: microseconds of the eager reference, and how often faster the others are."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in figures["rows"]:
        sizes = ", ".join(f"{key} {value}" for key, value in row["sizes"].items())
        group = (_title(row["operation"], row["direction"]), sizes, row["dtype"])
        groups.setdefault(group, {})[row["contender"]] = row
    rows = []
    for group, by_contender in groups.items():
        eager, ours = by_contender.get("eager"), by_contender.get("squid_fast", {})
        cells = [_microseconds(eager["median_us"]) if eager else ""]
        for contender in ("compiled", "squid_fast"):
            ratio = by_contender.get(contender, {}).get("ratio_to_eager")
            cells.append(f"{ratio:.2f} ×" if ratio else "")
        if cuda:
            fraction = ours.get("fraction_of_floor")
            cells.append(_microseconds(ours["cold_us"]) if ours else "")
            cells.append(f"{fraction:.0%}" if fraction else "")
        rows.append([*group, *cells])
    failed = sum(not reason.startswith("skipped") for reason in figures["failures"].values())
    threads = "" if cuda else f"{figures['threads']} threads; "
    note = (
        f"{figures['device']}, torch {figures['torch']}, triton {figures['triton']}, commit "
        f"{figures['commit']}, {figures['date']}; {threads}medians, × is how often faster than the "
        f"eager reference; {failed} contenders failed."
    )
    head = ["operation", "sizes", "dtype", "eager, µs", "compiled", "squid_fast"]
    return table(head + ["cold, µs", "of the floor"] * cuda, rows, text=3, note=note)


def floors() -> str:
    """The least time of every operation at the published sizes on an H100, and the measured."""
    measured = {
        (row["operation"], row["direction"], row["dtype"], str(row["sizes"])): row["cold_us"]
        for row in measurements.read(measurements.RESULTS / "micro_cuda.json").get("rows", [])
        if row["contender"] == "squid_fast"
    }
    rows = []
    for case in cases(torch.device("cuda")):
        if case.dtype != "bfloat16" or dict(case.sizes)["B"] != 512:
            continue
        time = measured.get((case.operation, case.direction, case.dtype, str(dict(case.sizes))))
        work = work_of(case)
        floor = f"{H100.floor(work, case.unit) * 1e6:.1f}"
        cells = (f"{work.bytes / 1e6:.1f}", f"{work.flops / 1e9:.2f}", floor)
        title = _title(case.operation, case.direction)
        shown = "not yet" if time is None else f"{time:.1f}"
        rows.append((title, case.label.replace("=", " "), *cells, shown))
    head = ["operation", "sizes", "MB", "GFLOP", "floor, µs", "measured, µs"]
    return table(head, rows, text=2, note="bfloat16; ceilings of the H100 SXM's data sheet.")


TABLES = {
    "micro_cpu": of_file("micro_cpu.json", micro),
    "micro_cuda": of_file("micro_cuda.json", partial(micro, cuda=True)),
    "floors": floors,
}
