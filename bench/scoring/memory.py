"""Peak memory of a screening run, and of its largest reader, by the number of files.

The files are links to some hundred images, and the model is tiny. Figures go to ``memory.json``.
Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..arguments import add_option, add_output
from ..measurements import Results
from .images import make_images
from .soak import make_bundle


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
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except OSError:
        return []


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


def add_arguments(parser: ArgumentParser) -> None:
    help = "Numbers of files, each screened in a run of its own"
    add_option(parser, "--files", [1000, 10_000, 100_000], help)
    add_output(parser)


def main(options: Namespace) -> None:
    """Measure and write the results file."""
    settings = {"cores": os.cpu_count()}
    results = Results(options.output / "memory.json", torch.device("cpu"), settings)
    runs = results.figures["runs"] = []
    for files in options.files:
        with tempfile.TemporaryDirectory() as folder:
            make_bundle(Path(folder) / "bundle", seed=0)
            runs.append(measure(files, Path(folder)))
        print(json.dumps(runs[-1]), flush=True)
    results.write()
