"""Tests and measurements of a machine with a GPU, in stages, what matters most first.

- ``contact``: every operation once at published sizes, against float64;
- ``levers``: where scoring spends its time, and what each piece of ours gives;
- ``steps``: where training spends its time, and what each piece of ours gives;
- ``tests``: the tests that call kernels, on the device;
- ``networks``: those of scoring and training, CUDA graphs among them;
- ``peers``: what TF32, bf16 and ``torch.compile`` give to the published way;
- ``speed``: scoring and training beside the published way;
- ``operations``: every operation beside the reference, eager and compiled.

A stage is one or more steps, and takes five minutes at most. Each step runs within the time that is
left, and one that fails does not stop the others. With ``--resume``, steps that have passed do not
run again. Exit codes: 0 if all steps passed, 1 if one failed, 2 if there is no GPU. Figures go to
files of the stages, exit codes and seconds of the steps to ``summary.json``, and what the steps
print to ``log.txt``. On a CPU, a rehearsal, steps run without the modules that a bare GPU machine
lacks, see ``bare/sitecustomize.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from ..arguments import add_option, add_output
from ..measurements import RESULTS, ROOT, Results
from ..operations.cases import OPERATIONS
from ..scoring.speed import PARTS

STAGES = ("contact", "levers", "steps", "tests", "networks", "peers", "speed", "operations")
TESTS = {
    "tests": ["tests/kernels", "tests/ops"],
    "networks": [
        "tests/inference",
        "tests/modules/test_golden.py",
        "tests/training/test_graphs.py",
    ],
}
BARE = Path(__file__).parent / "bare"
_REHEARSED = ["tests/kernels/test_gumbel_shrinkage.py", "-k", "equals_reference and float32"]
_CHECKED = "memory_lookup forward_backward bfloat16 B=16 N=4 M=200 C=2048 k=5"  # by the sanitizer
_WORKERS = 13  # test processes; compiling takes most of their time
_SHOWN = 12  # last lines that a step has printed
_GRACE = 8.0  # seconds in which an interrupted process has to end
_OUT_OF_TIME = 124
_LONGEST = 300  # seconds of a stage
_SAME = ("device", "commit", "torch", "triton")  # of a run that --resume goes on with

Command = list[str]


@dataclass(frozen=True)
class Step:
    """Commands that run side by side, for at most so many seconds."""

    name: str
    seconds: float
    commands: list[Command]
    environment: dict[str, str] = field(default_factory=dict)


def steps_of(stage: str, options: Namespace) -> list[Step]:
    """The steps of a stage on the device of the options."""
    python, cuda = [sys.executable, "-m"], options.device == "cuda"
    common = ["--device", options.device, "--output", str(options.output)]
    if stage in TESTS:
        # -v names a test as soon as it has failed, whatever ends the run.
        command = [*python, "pytest", "-v", "-rf", "--tb=short"]
        command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
        kernels = stage == "tests"
        if not cuda:
            found = [*command, "-qq", "--collect-only", *TESTS[stage]]
            steps = [Step(f"{stage}: found", 60, [found])]
            own = [*command, *(options.tests or _REHEARSED)]
            return [*steps, Step(stage, 60, [own])] if kernels else steps
        if find_spec("xdist"):
            command += ["-n", f"{_WORKERS}", "--dist", "worksteal"]
        chosen = options.tests if kernels and options.tests else TESTS[stage]
        steps = [Step(stage, 240, [[*command, *chosen]])]
        if kernels and (sanitizer := shutil.which("compute-sanitizer")):
            checked = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9"]
            checked += ["--print-limit", "5", *python, "bench.gpu.contact", "cuda", _CHECKED]
            steps.append(Step("sanitizer", 60, [checked], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
        return steps
    if stage == "speed":
        command = [*python, "bench", "speed", *common]
        if cuda:
            command += ["--rounds", "15", "--part"]
            return [Step(f"speed: {part}", 60, [[*command, part]]) for part in PARTS]
        command += ["--preset", "small", "--part", "training", "--rounds", "1", "--batch", "2"]
        return [Step("speed", 60, [[*command, "--threads", "1"]])]
    if stage == "operations":
        command = [*python, "bench", "operations", *common]
        each = {name: [*command, "--operation", name] for name in OPERATIONS}
        if not cuda:
            return [Step("operations", 60, [[*each["memory_lookup"], "--sizes", "tiny"]])]
        # Compiled side by side while nothing is timed; later steps find the code in the caches.
        compile, floors = 100, 20
        share = (_LONGEST - compile - floors) / len(each)
        own = ["--seconds", f"{0.8 * share:.0f}"]  # so that a program stops by itself
        return [
            Step("operations: compile", compile, [[*one, "--check"] for one in each.values()]),
            Step("operations: floors", floors, [[*command, "--floors"]]),
            *(Step(f"operations: {name}", share, [[*each[name], *own]]) for name in each),
        ]
    seconds = {
        "contact": {"contact": 90},
        "levers": {"levers": 180, "biases": 45},
        "steps": {"steps": 120},
        "peers": {"peers": 60},
    }
    return [
        Step(program, most, [[*python, "bench.gpu", program, *common, "--seconds", f"{most - 5}"]])
        for program, most in seconds[stage].items()
    ]


def rehearsed() -> dict[str, str]:
    """The environment of a rehearsal: that of a bare GPU machine, with one thread."""
    path = os.pathsep.join(filter(None, [str(BARE), os.environ.get("PYTHONPATH")]))
    # At tiny sizes threads would only wait for one another.
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(step: Step, seconds: float, log: Path) -> int:
    """Run a step within the seconds, and log what it prints: the exit code."""
    deadline, code = time.monotonic() + min(step.seconds, seconds), 0
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment
    with log.open("ab+") as output:
        output.write(f"== {step.name}\n".encode())
        output.flush()
        begin = output.tell()
        how = {"cwd": ROOT, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
        # In sessions of their own, so that the processes that they start end with them.
        running = [subprocess.Popen(x, start_new_session=True, **how) for x in step.commands]
        for process in running:
            try:
                code = process.wait(max(deadline - time.monotonic(), 0)) or code
            except subprocess.TimeoutExpired:
                code = _OUT_OF_TIME
                _end(process)
        output.seek(begin)
        lines = output.read().decode(errors="replace").splitlines()
    print("\n".join(line[:300] for line in lines[-_SHOWN:]), flush=True)
    return code


def failed_tests(log: Path, step: str) -> list[str]:
    """The tests that failed in the last run of a step, by name."""
    printed = log.read_text(errors="replace").rpartition(f"== {step}\n")[2]
    test = r"(\S+\.py(?:::.*?)?)"
    named = re.findall(rf"(?:FAILED|ERROR) {test} *(?: - .*)?$", printed, re.MULTILINE)
    named += re.findall(rf"^{test} (?:FAILED|ERROR) +\[", printed, re.MULTILINE)
    return sorted(set(named))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process, after which pytest says what has failed, and kill what is left."""
    for number in (signal.SIGINT, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
        return


def add_arguments(parser: ArgumentParser) -> None:
    help = f"Stages to run, of {', '.join(STAGES)}. Default: all."
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=help)
    help = "Device; cpu rehearses the stages at tiny sizes"
    add_option(parser, "--device", "cuda", help, choices=("cuda", "cpu"))
    add_option(parser, "--limit", 540.0, "Seconds that all stages may take")
    help = "Go on with the run whose results lie there, if it is of this commit and device."
    parser.add_argument("--resume", action="store_true", help=help)
    help = "Arguments of pytest in the stage 'tests', in place of the usual ones."
    parser.add_argument("--tests", nargs="+", metavar="PATH", help=help)
    add_output(parser, RESULTS / "gpu")


def main(options: Namespace) -> None:
    """Run the stages."""
    if unknown := set(options.stages) - set(STAGES):
        sys.exit(f"There is no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no GPU here; --device cpu rehearses the stages.", file=sys.stderr)
        sys.exit(2)
    started = time.monotonic()
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "log.txt"
    settings = {"limit_s": options.limit}
    summary = Results(options.output / "summary.json", torch.device(options.device), settings)
    if options.resume:
        summary.resume(*_SAME)
    if not summary.figures:
        log.unlink(missing_ok=True)
    print(summary.header, flush=True)
    rows = summary.figures.setdefault("steps", [])
    passed = {row["step"] for row in rows if row["exit_code"] == 0}
    steps = [step for stage in options.stages or STAGES for step in steps_of(stage, options)]
    for step in steps:
        if step.name in passed:
            continue
        if options.device == "cpu":
            step = replace(step, environment=step.environment | rehearsed())
        begun = time.monotonic()
        left = options.limit - (begun - started)
        print(f"\n== {step.name}", flush=True)
        code, failed = _OUT_OF_TIME, []
        if left > 5:
            code = run(step, left, log)
            failed = failed_tests(log, step.name) if code else []
            print("\n".join(failed), flush=True)
        seconds = round(time.monotonic() - begun, 1)
        rows[:] = [row for row in rows if row["step"] != step.name]
        row = {"step": step.name, "exit_code": code, "seconds": seconds}
        rows.append(row | ({"failed": failed} if failed else {}))
        summary.write()
    print()
    asked = {step.name for step in steps}
    rows = [row for row in rows if row["step"] in asked]
    for row in rows:
        state = {0: "passed", _OUT_OF_TIME: "FAILED: out of time"}
        ended = state.get(row["exit_code"], f"FAILED: exit code {row['exit_code']}")
        print(f"{row['step']:30} {row['seconds']:6.1f} s  {ended}")
    sys.exit(any(row["exit_code"] for row in rows))
