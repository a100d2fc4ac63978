"""Every operation once on the device, at published sizes, against the reference in float64.

On a GPU each case has a process of its own, since a kernel that reads where it must not would take
the others along, and compiling takes most of the time. Memory is full of NaN beforehand, and a
second call has to give the same bits. ``python -m bench.gpu.contact cuda CASE ...`` checks cases in
one process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import torch

from ..measurements import ROOT
from ..operations.cases import Case
from ..operations.problems import WrongResultError, call_of, problem
from ..operations.verify import verify
from .trials import Trials

_SECONDS = 75  # for a case
_SIDE_BY_SIDE = 8  # cases
_LOOKUP = {"N": 4, "M": 200, "C": 2048, "k": 5}
_MAPS = {"N": 4, "C": 512, "side": 4, "layout": "channels_last"}
_CELLS = {"C": 32, "side": 64, "behind": "nothing"}
_BEHIND = {"behind": "residual, head"}
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
    ("upsample_concat", _BOTH, {"N": 4, "P": 1, "C": 256, "S": 128, "side": 8}),
    ("upsample_concat", _BOTH, {"N": 1, "P": 2, "C": 128, "S": 0, "side": 16}),
    ("batch_norm", _BOTH, {"N": 4, "C": 32, "side": 64, "residual": False}),
    ("batch_norm", _BOTH, {"N": 4, "C": 32, "side": 64, "residual": True}),
    ("stem", "forward", {"P": 2, "side": 128, "F": 32, "images": "uint8"}),
    ("reconstruct", "forward", {"P": 2, "side": 128, "F": 32, "images": "uint8"}),
    ("window_lookup", "forward", {"N": 4, "c": 256, "side": 8, "grid": 2, "M": 200, "k": 5}),
    ("window_lookup", "forward", {"N": 4, "c": 128, "side": 16, "grid": 2, "M": 200, "k": 5}),
    ("queue_lookup", "forward", _LOOKUP),
    ("split_linear", "forward", {"N": 4, "T": 2048, "S": 512}),
    ("cell_convolution", "forward", _CELLS | {"D": 32, "resized": False}),
    ("cell_convolution", "forward", _CELLS | {"D": 32, "resized": False} | _BEHIND),
    ("cell_convolution", "forward", _CELLS | {"D": 16, "resized": True}),
    ("discriminator_score", "forward", {"side": 128, "mode": "instance"}),
    ("discriminator_score", "forward", {"side": 128, "mode": "running"}),
)
# In place of both: kernels of one dtype.
_DTYPES = {
    "window_lookup": ("bfloat16",),
    "queue_lookup": ("float32",),
    "split_linear": ("float32",),
    "cell_convolution": ("bfloat16",),
    "discriminator_score": ("float32",),
}
_TINY = {"B": 2, "M": 20, "C": 64}  # in place of these sizes, where there is no GPU


def cases(device: torch.device) -> dict[str, Case]:
    """The cases by name."""
    bf16, float32 = "bfloat16", "float32"
    chosen = [
        (operation, direction, dtype, {"B": B} | sizes)
        for operation, direction, sizes in _OPERATIONS
        for dtype, B in product(_DTYPES.get(operation, (bf16, float32)), (16, 512))
    ]
    extra = [(bf16, 16, 10_000), (float32, 16, 10_000), (bf16, 4096, 200), ("float16", 512, 200)]
    for dtype, B, M in extra:
        chosen.append(("memory_lookup", _BOTH, dtype, {"B": B} | _LOOKUP | {"M": M}))
    found = {}
    for operation, direction, dtype, sizes in chosen:
        if device.type == "cpu":
            sizes = {name: _TINY.get(name, value) for name, value in sizes.items()}
        case = Case(operation, direction, dtype, tuple(sizes.items()))
        found[case.group] = case
    return found


def check(device: torch.device, name: str) -> dict[str, Any]:
    """Call an operation twice and compare it with the reference: what was found."""
    case, started = cases(device)[name], time.perf_counter()
    made = problem(case, device)
    call = call_of(case, made, made.ours)

    def seeded() -> list[torch.Tensor]:
        torch.manual_seed(0)  # the masked shortcut draws
        if device.type == "cuda":  # the memory that is freed here is given to the results
            for _ in range(8):
                torch.full((2**24,), float("nan"), device=device)
        return call()

    first = seeded()
    row: dict[str, Any] = {"same_bits": all(map(torch.equal, first, seeded()))}
    if not row["same_bits"]:
        row["problem"] = "not the same bits twice"
    try:
        row["error"] = float(f"{verify(case, made, lambda: first):.2g}")
    except WrongResultError as wrong:
        row["problem"] = str(wrong)
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def _in_a_process(device: torch.device, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.gpu.contact", device.type, name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return {"problem": f"not done in {_SECONDS} s"}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            return dict(json.loads(line))
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
    return {"problem": reason}


def make(run: Trials) -> None:
    """Check every case."""
    checked = partial(check if run.rehearsal else _in_a_process, run.device)
    names = list(cases(run.device))
    with ThreadPoolExecutor(1 if run.rehearsal else _SIDE_BY_SIDE) as pool:
        for name, row in zip(names, pool.map(checked, names), strict=True):
            run.note(name, row)
            if "problem" in row:
                run.failures.append(name)
    print(f"{len(names) - len(run.failures)} of {len(names)} cases are right.")


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        print(json.dumps(check(torch.device(sys.argv[1]), argument)), flush=True)
