"""How far the demo's results spread, alone and beside a busy process: ``python -m bench demo``.

Runs ``squid-fast demo`` with seed after seed, in turn alone and beside a process that computes all
the time, and writes what each run says to ``bench/results/demo.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from squid_fast.utils.atomic import write_json

from ..measurements import ROOT, describe
from .threads import busy

RESULTS = ROOT / "bench" / "results" / "demo.json"
KEPT = ("aurocs", "trained_grids", "training_seconds", "seconds")


def run(minutes: float, seed: int, others: int) -> dict[str, Any]:
    """One demo beside so many busy processes: what is kept of its result."""
    with tempfile.TemporaryDirectory() as folder, busy(others):
        command = [sys.executable, "-m", "squid_fast", "demo", "--json", "--seed", str(seed)]
        command += ["--minutes", str(minutes), "--out", str(Path(folder) / "demo")]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    kept = {name: found[name] for name in KEPT} | {"threads": found["machine"]["threads"]}
    return {"seed": seed, "busy": others, **kept}


def main() -> None:
    """Run the demos and write the results file after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="each alone and beside another")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = describe(torch.device("cpu")) | {"minutes": options.minutes, "runs": []}
    for seed in range(options.seeds):
        for others in (0, 1):
            results["runs"].append(run(options.minutes, seed, others))
            write_json(results, options.output)
            print(json.dumps(results["runs"][-1]), flush=True)


if __name__ == "__main__":
    main()
