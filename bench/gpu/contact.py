"""Every operation once on the device, at published sizes, against the reference in float64.

On a GPU each case has a process of its own, since a kernel that reads where it must not would take
the others along, and compiling takes most of the time. Memory is full of NaN beforehand, and a
second call has to give the same bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import torch

from squid_fast.utils.devices import choose_device

from ..arguments import add_device, add_output
from ..measurements import ROOT, Results
from ..operations.cases import Case
from ..operations.problems import WrongResultError, call_of, problem
from ..operations.verify import verify

_SECONDS = 75  # for a case
_SIDE_BY_SIDE = 8  # cases
_LOOKUP = {"N": 4, "M": 200, "C": 2048, "k": 5}
_MAPS = {"N": 4, "C": 512, "side": 4, "layout": "channels_last"}
_BOTH, _SLOTS = "forward_backward", "forward_backward_slots"
_OPERATIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("gumbel_shrinkage", _BOTH, {"N": 4, "M": 200, "k": 5}),
    ("hard_shrinkage", _BOTH, {"N": 4, "M": 200, "k": 5}),
    ("memory_lookup", _BOTH, _LOOKUP),
    ("memory_lookup", _SLOTS, _LOOKUP),
    ("projected_lookup", "forward", _LOOKUP),
    ("masked_shortcut", _BOTH, _MAPS | {"affine": False}),
    ("masked_shortcut", _BOTH, _MAPS | {"affine": True}),
    ("neighbourhood_attention", _BOTH, {"N": 4, "C": 2048}),
    ("neighbourhood_attention", _BOTH, {"N": 9, "C": 1024}),
)
_TINY = {"B": 2, "M": 20, "C": 64}  # in place of these sizes, where there is no GPU


def cases(device: torch.device) -> dict[str, Case]:
    """The cases by name."""
    chosen = [
        (operation, direction, dtype, {"B": B} | sizes)
        for (operation, direction, sizes), dtype, B in product(
            _OPERATIONS, ("bfloat16", "float32"), (16, 512)
        )
    ]
    for dtype in ("bfloat16", "float32"):
        chosen.append(("memory_lookup", _BOTH, dtype, {"B": 16} | _LOOKUP | {"M": 10_000}))
    chosen.append(("memory_lookup", _BOTH, "bfloat16", {"B": 4096} | _LOOKUP))
    chosen.append(("memory_lookup", _BOTH, "float16", {"B": 512} | _LOOKUP))
    found = {}
    for operation, direction, dtype, sizes in chosen:
        if device.type == "cpu":
            sizes = {name: _TINY.get(name, value) for name, value in sizes.items()}
        case = Case(operation, direction, dtype, tuple(sizes.items()))
        found[case.group] = case
    return found


def check(name: str, device: torch.device) -> dict[str, Any]:
    """Call an operation twice and compare it with the reference: the row of a case."""
    case = cases(device)[name]
    started = time.perf_counter()
    made = problem(case, device)
    call = call_of(case, made, made.ours)

    def seeded() -> list[torch.Tensor]:
        torch.manual_seed(0)  # the masked shortcut draws
        if device.type == "cuda":  # the memory that is freed here is given to the results
            for _ in range(8):
                torch.full((2**24,), float("nan"), device=device)
        return call()

    first = seeded()
    row: dict[str, Any] = {
        "case": name,
        "same_bits": all(map(torch.equal, first, seeded())),
    }
    try:
        row["error"] = float(f"{verify(case, made, lambda: first):.2g}")
    except WrongResultError as wrong:
        row["problem"] = str(wrong)
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def _in_a_process(names: list[str], device: torch.device) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.gpu.contact", "--device", device.type, "--case", *names]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return [{"case": name, "problem": f"not done in {_SECONDS} s"} for name in names]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
    return rows + [{"case": name, "problem": reason} for name in names[len(rows) :]]


def main() -> None:
    """Check the cases; exit with 1 if something is wrong."""
    parser = ArgumentParser(description=__doc__)
    help = "Cases to check in this process, printed as lines of JSON. Default: all."
    parser.add_argument("--case", nargs="+", metavar="NAME", help=help)
    add_device(parser)
    add_output(parser, ROOT / ".benchmarks")
    options = parser.parse_args()
    device = choose_device(options.device)
    if options.case:
        for name in options.case:
            print(json.dumps(check(name, device)), flush=True)
        return
    names = list(cases(device))
    groups = [[name] for name in names] if device.type == "cuda" else [names]
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        found = pool.map(partial(_in_a_process, device=device), groups)
        rows = [row for group in found for row in group]
    results = Results(options.output / f"contact_{device.type}.json", device)
    results.figures["cases"] = rows
    results.write()
    wrong = [row for row in rows if "problem" in row or not row["same_bits"]]
    for row in wrong:
        print(f"{row['case']}: {row.get('problem', 'not the same bits twice')}")
    print(f"{len(rows) - len(wrong)} of {len(rows)} cases are right.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
