"""Every shipped kernel configuration in machine code for cards that need not be there.

The calls listed in ``bench/machine_code/cases.py`` are made for an A100 (sm_80), an H100 (sm_90)
and an MI300X (gfx942), and what the launchers would launch is compiled in place of being launched.
Registers, spilled bytes, shared memory, matrix instructions and code size of each configuration are
printed and go to ``compile_report.json`` or, by another Triton than that of ``constraints.txt``, to
``compile_report_VERSION.json``. The exit code is 1 if a configuration spills, asks for
more shared memory than the card has, lacks matrix instructions, or does not wait for its products.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch

import triton
from rich.console import Console
from rich.progress import track

from squid_fast import kernels

from ..arguments import add_folder, add_option
from ..markdown import table
from ..measurements import RESULTS, ROOT, write
from .cases import cases
from .compilers import CARDS, Launch, Row, describe, measure, recorded

WARPGROUP_ROWS = 64  # that sm_90's warpgroup instructions multiply at once


def file_name(version: str) -> str:
    """Name of the results file of that Triton, by which each version has one."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = f"triton=={version}" in pins.splitlines()
    return "compile_report.json" if pinned else f"compile_report_{version}.json"


def shipped(pattern: str) -> set[str]:
    """All kernels whose "file.name" has the pattern in it."""
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        names = vars(importlib.import_module(module.name))
        found |= {f"{module.name}.{name}" for name in names if name.endswith("_kernel")}
    return {name for name in found if fnmatch(name, f"*{pattern}*")}


def collect(archs: list[str], pattern: str) -> tuple[dict[Launch, list[str]], list[str]]:
    """Launches of all listed calls, each with the labels of these calls, and what went wrong."""
    wanted, reached = shipped(pattern), set()
    launches: dict[Launch, list[str]] = {}
    failures = []
    for arch, case in itertools.product(archs, cases() if wanted else ()):
        with recorded(CARDS[arch]) as made:
            try:
                case.call()
            except Exception as error:
                failures.append(f"{case.label} for {arch}: {type(error).__name__}: {error}")
        for launch in dict.fromkeys(made):
            name = f"{launch.module}.{launch.kernel}"
            reached.add(name)
            if name in wanted:
                launches.setdefault(launch, []).append(case.label)
    if len(archs) == len(CARDS):  # some kernels may suit some cards only
        advice = "is launched by no call of bench/machine_code/cases.py; list one."
        failures += [f"{name} {advice}" for name in sorted(wanted - reached)]
    return launches, failures


def hardest(launches: dict[Launch, list[str]]) -> dict[Launch, list[str]]:
    """One launch of every configuration, with the calls of all.

    A configuration is what constants, dtypes, warps, stages and the like make up. Within it,
    unaligned sizes make addresses more work: the launch with most of them needs most registers. A
    size of 1 is a constant.
    """
    groups: dict[str, list[tuple[int, Launch]]] = {}
    for launch in launches:
        row = describe(launch)
        arguments = row["arguments"]
        # Pointers that are there or not; strides that are 1 or not.
        row["arguments"] = {
            name: kind.removesuffix(":16") if "stride" not in name else kind == "1"
            for name, kind in arguments.items()
            if kind[0] == "*" or kind == "None" or "stride" in name
        }
        unaligned = sum(kind != "1" and not kind.endswith(":16") for kind in arguments.values())
        groups.setdefault(json.dumps(row), []).append((unaligned, launch))
    chosen = {}
    for group in groups.values():
        group.sort(key=lambda entry: entry[0], reverse=True)  # its own calls stand first
        chosen[group[0][1]] = [label for _, launch in group for label in launches[launch]]
    return chosen


def _unit(dot: str, arch: str) -> str:
    """The instructions that a dot, "rows x depth x columns dtype", should become."""
    if CARDS[arch].is_amd:
        return "MFMA"
    rows, *others = dot.split()[0].split("x")
    # Warpgroups multiply plain matrices, float32 too (as TF32, which is what tf32x3 is made of).
    wide = arch == "sm_90" and int(rows) >= WARPGROUP_ROWS and len(others) == 2
    return "HGMMA" if wide else "HMMA"


def problems(row: Row) -> list[str]:
    """What must not be in a shipped configuration, in sentences."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    spilled, instructions = row["spilled_bytes"], row["spill_instructions"]
    if spilled or instructions:
        what = f"spills {spilled} bytes of every thread's registers"
        found.append(f"{what}, with {instructions} loads and stores; the limit is 0.")
    asked, limit = row["shared_bytes"], CARDS[row["arch"]].shared_memory
    if asked > limit:
        may = f"a program on {row['arch']} may use {limit}"
        found.append(f"asks for {asked} bytes of shared memory; {may}.")
    expected: dict[str, list[str]] = {}
    for dot in row["dots"]:
        expected.setdefault(_unit(dot, row["arch"]), []).append(dot)
    counted = row["matrix_instructions"]
    for unit in sorted(expected.keys() - counted.keys()):
        has = ", ".join(counted) or "no matrix instruction at all"
        found.append(f"multiplies {' and '.join(expected[unit])} without {unit}; it has {has}.")
    for unit in sorted(counted.keys() - expected.keys()):
        found.append(f"has {counted[unit]} {unit}, but all its dots should be other ones.")
    if (outside := row["dots_without_matrix_unit"]) and counted:
        found.append(f"multiplies {outside} of its dots outside the matrix units.")
    if loops := row["unwaited_products"]:
        what = f"may overwrite rows in registers that are still being multiplied, in {loops} loops"
        found.append(f"{what}; something in the loop has to use the product.")
    return found


def _title(row: Row) -> str:
    settings = row["constants"] | row["options"]
    said = " ".join(f"{name}={value}" for name, value in settings.items())
    return f"{row['kernel']} for {row['arch']}, {'+'.join(row['dtypes'])}, {said}"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"


HEAD = ("n", "registers", "spilled", "shared", "matrix", "code", "")
CAPTION = (
    "n configurations of that layout; registers and spilled bytes of a thread, shared memory and "
    "code in KB, matrix instructions in the code."
)


def tables(rows: list[Row], brief: bool) -> Iterator[str]:
    """A line for each kernel, card, dtype, tile, warps, stages; in brief, for kernel and card."""
    if brief:
        yield _table(rows, ("kernel", "card"), lambda row: (row["kernel"], row["arch"]))
        return
    for kernel in sorted({row["kernel"] for row in rows}):
        own = [row for row in rows if row["kernel"] == kernel]
        yield f"{kernel}\n\n{_table(own, ('card', 'dtype', 'tile', 'warps', 'stages'), _layout)}"


def _table(rows: list[Row], head: Sequence[str], key: Callable[[Row], tuple[str, ...]]) -> str:
    groups = itertools.groupby(sorted(rows, key=key), key)
    lines = [(*names, *_cells(list(group))) for names, group in groups]
    return table((*head, *HEAD), lines, text=min(len(head), 3))


def _layout(row: Row) -> tuple[str, ...]:
    sizes = {k[6:].lower(): v for k, v in row["constants"].items() if k.startswith("BLOCK_")}
    tile = " ".join(f"{name}{value}" for name, value in sizes.items())
    launch = (str(row["options"][name]) for name in ("num_warps", "num_stages"))
    return row["arch"], "+".join(row["dtypes"]), tile, *launch


def _cells(group: list[Row]) -> list[str]:
    """How many configurations, and the range or the largest of their figures."""
    bad = "bad" if any(row["problems"] for row in group) else ""
    good = [row for row in group if "error" not in row]
    if not good:
        return [str(len(group)), *["-"] * 5, bad]
    counts = [row["matrix_instructions"] for row in good]
    units = sorted({unit for found in counts for unit in found})
    matrix = [f"{unit} {_span([found.get(unit, 0) for found in counts])}" for unit in units]
    return [
        str(len(group)),
        _span([row["registers"] for row in good]),
        str(max(row["spilled_bytes"] for row in good)),
        f"{max(row['shared_bytes'] for row in good) / 1024:.1f}",
        " ".join(matrix),
        f"{max(row['code_bytes'] for row in good) / 1024:.1f}",
        bad,
    ]


def add_arguments(parser: ArgumentParser) -> None:
    help = "Part of the names of the kernels to compile, or a pattern with * and ?. Default: all."
    parser.add_argument("--only", default="", metavar="PATTERN", help=help)
    parser.add_argument("--arch", choices=CARDS, help="Card. Default: all.")
    help = "All variants, in place of the hardest ones."
    parser.add_argument("--every", action="store_true", help=help)
    help = "One line for each kernel and card."
    parser.add_argument("--brief", action="store_true", help=help)
    help = "Folder of the results file. Default: bench/results, if all kernels are compiled."
    add_folder(parser, "--output", help)
    add_option(parser, "--workers", os.cpu_count() or 1, "Number of compilations at a time")


def main(options: Namespace) -> None:
    """Compile, print and write; exit with 1 if something is wrong."""
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it.")
    started = time.monotonic()
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # which only debuggers want
    launches, failures = collect([options.arch] if options.arch else list(CARDS), options.only)
    if not options.every:
        launches = hardest(launches)
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        how = {"console": Console(stderr=True), "transient": True}
        done = track(pool.map(measure, launches), "compiling", len(launches), **how)
        for calls, row in zip(launches.values(), done, strict=True):
            known = {"calls": len(calls), "first_call": calls[0]}
            rows.append(row | known | {"problems": problems(row)})
    rows.sort(key=lambda row: (row["file"], row["kernel"], row["arch"], json.dumps(row)))
    narrowed = options.only or options.arch or options.every
    if output := options.output or (None if narrowed else RESULTS):
        # Without machine and date: the file is the same whenever the machine code is the same.
        content = {"triton": triton.__version__, "configurations": rows}
        write(content, output / file_name(triton.__version__))
    for shown in tables(rows, options.brief):
        print(shown, end="\n\n")
    print(CAPTION)
    failures += [f"{_title(row)} {problem}" for row in rows for problem in row["problems"]]
    for failure in failures:
        print(failure)
    print(
        f"{len(rows)} configurations of {len({row['kernel'] for row in rows})} kernels in "
        f"{time.monotonic() - started:.0f} s; {len(failures)} problems."
    )
    if not rows:
        print(f"Nothing was compiled: no kernel's name has {options.only!r} in it.")
    sys.exit(bool(failures) or not rows)
