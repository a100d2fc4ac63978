"""Time of a training step alone and beside busy processes, by number of threads.

Every way is timed in a process of its own, since OpenMP reads how threads wait when it is loaded:

- ``before``: all threads, which spin as long as GNU's OpenMP lets them by default;
- ``limited``: all threads, which spin as long as ``squid_fast.utils.threads`` lets them;
- ``one``: one thread;
- ``chosen``: the number of threads that ``squid_fast.utils.threads`` finds fastest.

Figures go to ``threads_cpu.json``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from squid_fast import SQUID
from squid_fast.presets import PRESETS, preset
from squid_fast.training.squid import SquidLearner
from squid_fast.training.state import Settings
from squid_fast.utils.devices import Precision, choose_precision
from squid_fast.utils.threads import SPIN, fastest_threads, threads

from ..arguments import add_option, add_output
from ..measurements import ROOT, Results

WAYS = ("before", "limited", "one", "chosen")
BUSY = (0, 1, 2, 4)
_SPIN_BY_ITSELF = "300000"  # of GNU's OpenMP, see its function initialize_env
_SECONDS = 6.0
CPU = torch.device("cpu")


def steps(name: str, way: str, precision: Precision) -> dict[str, Any]:
    """Seconds of a step of the preset: threads, mean, median, longest, and how many were timed."""
    chosen = preset(name)
    count = chosen.recipe.batch_size
    settings = Settings(chosen.model, chosen.recipe, 0, precision, count, "")
    learner = SquidLearner(SQUID(**chosen.model), settings, CPU)
    images = torch.rand(count, 1, chosen.image_size, chosen.image_size)
    turns = chosen.recipe.n_critic

    def turn() -> None:
        for number in range(turns):
            learner.step(images, number)

    number = 1 if way == "one" else torch.get_num_threads()
    if way == "chosen":
        number = fastest_threads(turn, number)
    with threads(number):
        turn()
        found: list[float] = []
        while not found or sum(found) * turns < _SECONDS:
            started = time.perf_counter()
            turn()
            found.append((time.perf_counter() - started) / turns)
    figures = {"mean": statistics.mean(found), "median": statistics.median(found)}
    rounded = {name: round(x, 4) for name, x in (figures | {"longest": max(found)}).items()}
    return {"threads": number, **rounded, "steps": len(found) * turns}


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many other processes compute all the time inside the block."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def add_arguments(parser: ArgumentParser) -> None:
    add_option(parser, "--preset", "small", "Preset that is trained", choices=PRESETS)
    precisions = ("auto", "bf16", "float32")
    add_option(parser, "--precision", "auto", "Precision of training", choices=precisions)
    add_option(parser, "--rounds", 3, "Number of rounds, of which the upper median is kept")
    help = "Way to time in this process, printed as JSON. Default: all, each in its own process."
    parser.add_argument("--way", choices=WAYS, help=help)
    add_output(parser)


def main(options: Namespace) -> None:
    """Measure all ways beside all numbers of busy processes and write the results file."""
    precision = choose_precision(options.precision, CPU)
    if options.way:
        print(json.dumps(steps(options.preset, options.way, precision)))
        return
    settings = {"preset": options.preset, "precision": precision, "rounds": options.rounds}
    results = Results(options.output / "threads_cpu.json", CPU, settings)
    rows = results.figures["rows"] = []
    command = [sys.executable, "-m", "bench", "threads", "--preset", options.preset]
    command += ["--precision", precision, "--way"]
    for processes in BUSY:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        with busy(processes):
            for way in WAYS * options.rounds:
                spin = _SPIN_BY_ITSELF if way == "before" else SPIN["GOMP_SPINCOUNT"]
                environment = os.environ | {"GOMP_SPINCOUNT": spin}
                said = subprocess.check_output([*command, way], env=environment, cwd=ROOT)
                found[way].append(json.loads(said))
                print(processes, way, found[way][-1], flush=True)
        for way, times in found.items():
            middle = sorted(times, key=lambda row: row["mean"])[len(times) // 2]
            rows.append({"busy": processes, "way": way, **middle})
    results.write()
