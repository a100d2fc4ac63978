"""The table of what the compilers made of every kernel."""

from __future__ import annotations

from typing import Any

from .. import measurements
from ..markdown import of_file, table


def machine_code(report: dict[str, Any]) -> str:
    """Registers, memory and matrix instructions of every kernel on every card."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["configurations"]:
        kernel = row["kernel"].strip("_").removesuffix("_kernel")
        groups.setdefault((kernel, row["arch"]), []).append(row)
    rows = []
    for (kernel, arch), found in sorted(groups.items()):
        registers = [row["registers"] for row in found]
        span = f"{min(registers)}–{max(registers)}"
        spilled = max(row["spilled_bytes"] for row in found)
        shared = f"{max(row['shared_bytes'] for row in found) / 1024:.0f}"
        units = sorted({name for row in found for name in row["matrix_instructions"]})
        cells = (f"{len(found)}", span, f"{spilled}", shared, ", ".join(units) or "–")
        rows.append((kernel.replace("_", " "), arch, *cells))
    head = ["kernel", "card", "configurations", "registers", "spilled bytes", "shared KB"]
    note = f"Triton {report['triton']}; the largest of all configurations, of registers the range."
    for path in sorted(measurements.RESULTS.glob("compile_report_*.json")):
        note += f" {_other(measurements.read(path))}"
    return table([*head, "matrix units"], rows, text=(0, 1, 6), note=note)


def _other(report: dict[str, Any]) -> str:
    """What another Triton makes of the kernels, in a sentence."""
    rows = report["configurations"]
    spilled = max(row["spilled_bytes"] for row in rows)
    problems = sum(len(row["problems"]) for row in rows)
    return (
        f"Triton {report['triton']}: {len(rows)} configurations, {problems} problems, "
        f"{spilled} spilled bytes at most."
    )


TABLES = {"machine_code": of_file("compile_report.json", machine_code)}
