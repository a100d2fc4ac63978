"""How far the results of the demo spread, alone and beside a busy process.

``squid-fast demo`` is run with seed after seed, in turn alone and beside a process that computes
all the time. Figures go to ``demo.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..arguments import add_option, add_output
from ..measurements import ROOT, Results
from ..scoring.threads import busy

FIGURES = ("aurocs", "trained_grids", "training_seconds", "seconds")


def run(minutes: float, seed: int, others: int) -> dict[str, Any]:
    """One demo beside so many busy processes: a part of its result."""
    with tempfile.TemporaryDirectory() as folder, busy(others):
        command = [sys.executable, "-m", "squid_fast", "demo", "--json", "--seed", str(seed)]
        command += ["--minutes", str(minutes), "--out", str(Path(folder) / "demo")]
        found = json.loads(subprocess.check_output(command, cwd=ROOT))
    figures = {name: found[name] for name in FIGURES}
    return {"seed": seed, "busy": others, **figures, "threads": found["machine"]["threads"]}


def add_arguments(parser: ArgumentParser) -> None:
    add_option(parser, "--seeds", 5, "Number of seeds, each run alone and beside a busy process")
    add_option(parser, "--minutes", 4.0, "Minutes of a demo")
    add_output(parser)


def main(options: Namespace) -> None:
    """Run the demos and write the results file after each."""
    settings = {"minutes": options.minutes}
    results = Results(options.output / "demo.json", torch.device("cpu"), settings)
    runs = results.figures["runs"] = []
    for seed, others in product(range(options.seeds), (0, 1)):
        runs.append(run(options.minutes, seed, others))
        results.write()
        print(json.dumps(runs[-1]), flush=True)
