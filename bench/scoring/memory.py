"""What a screening run holds in memory, by the number of files.

``python -m bench memory`` screens 1,000, 10,000 and 100,000 files, links to some hundred images,
with a tiny model, and writes the peak memory of the run and of its largest reader to
``bench/results/memory.json``. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..measurements import describe
from .images import make_images
from .soak import make_bundle

RESULTS = Path(__file__).parents[1] / "results" / "memory.json"


def peak(pid: int) -> float:
    """Largest resident memory of a process so far, in MB; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM")), 0.0)


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in listed.split()]


def measure(files: int, folder: Path) -> dict[str, Any]:
    """One run over that many files."""
    make_images(folder / "images", files, 0, np.random.default_rng(0))
    command = [sys.executable, "-m", "squid_fast", "screen", str(folder / "bundle")]
    command += [str(folder / "images"), "--out", str(folder / "rows.parquet"), "--device", "cpu"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    run, reader = 0.0, 0.0
    while process.poll() is None:
        run = max(run, peak(process.pid))
        reader = max([reader, *map(peak, children(process.pid))])
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    seconds = round(time.perf_counter() - started, 1)
    return {"files": files, "seconds": seconds, "run_mb": round(run), "reader_mb": round(reader)}


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = []
    for files in options.files:
        with tempfile.TemporaryDirectory() as folder:
            make_bundle(Path(folder) / "bundle", seed=0)
            runs.append(measure(files, Path(folder)))
        print(json.dumps(runs[-1]), flush=True)
    results = describe(torch.device("cpu")) | {"cores": os.cpu_count(), "runs": runs}
    options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
