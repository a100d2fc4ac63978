"""Time of a training step alone and beside busy processes: ``python -m bench threads``.

Every way is timed in a process of its own, since OpenMP reads how threads wait when it is loaded:

- ``before``: all threads, which spin as long as GNU's OpenMP lets them by itself;
- ``limited``: all threads, which spin as ``squid_fast.utils.threads`` has it;
- ``one``: one thread;
- ``chosen``: the number of threads that ``squid_fast.utils.threads`` finds fastest.

Figures go to ``bench/results/threads_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from squid_fast import SQUID
from squid_fast.presets import preset
from squid_fast.training.squid import SquidLearner
from squid_fast.training.state import Settings
from squid_fast.utils.atomic import write_json
from squid_fast.utils.devices import Precision, choose_precision
from squid_fast.utils.threads import SPIN, fastest_threads, threads

from ..measurements import ROOT, describe

RESULTS = ROOT / "bench" / "results" / "threads_cpu.json"
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
    side = chosen.image_size
    images = torch.rand(count, 1, side, side)
    turns = chosen.recipe.n_critic

    def turn() -> None:
        for number in range(turns):
            learner.step(images, number)

    number = torch.get_num_threads()
    if way == "one":
        number = 1
    elif way == "chosen":
        number = fastest_threads(turn, number)
    with threads(number):
        turn()
        found: list[float] = []
        while not found or sum(found) * turns < _SECONDS:
            started = time.perf_counter()
            turn()
            found.append((time.perf_counter() - started) / turns)
    return {
        "threads": number,
        "mean": round(statistics.mean(found), 4),
        "median": round(statistics.median(found), 4),
        "longest": round(max(found), 4),
        "steps": len(found) * turns,
    }


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many other processes compute all the time inside the block."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Measure all ways beside all numbers of busy processes and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is kept")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--way", choices=WAYS, help="only this, in this process; prints JSON")
    options = parser.parse_args()
    precision = choose_precision(options.precision, CPU)
    if options.way:
        print(json.dumps(steps(options.preset, options.way, precision)))
        return
    command = [sys.executable, "-m", "bench.scoring.threads", "--preset", options.preset]
    command += ["--precision", precision, "--way"]
    rows = []
    for processes in BUSY:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        with busy(processes):
            for _ in range(options.rounds):
                for way in WAYS:
                    spin = _SPIN_BY_ITSELF if way == "before" else SPIN["GOMP_SPINCOUNT"]
                    done = subprocess.run(
                        [*command, way],
                        env=os.environ | {"GOMP_SPINCOUNT": spin},
                        cwd=ROOT,
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                    found[way].append(json.loads(done.stdout))
                    print(processes, way, done.stdout.strip(), flush=True)
        for way, times in found.items():
            middle = sorted(times, key=lambda row: row["mean"])[len(times) // 2]
            rows.append({"busy": processes, "way": way, **middle})
    about = {"preset": options.preset, "precision": precision, "rounds": options.rounds}
    write_json(describe(CPU) | about | {"rows": rows}, options.output)


if __name__ == "__main__":
    main()
