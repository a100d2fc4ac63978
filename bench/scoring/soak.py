"""A screening run that is killed again and again: whether every file has its row, once.

For each seed, a folder of small images is made, with broken ones of ten kinds among them. It is
screened once undisturbed and once killed with SIGKILL at random moments and resumed, and the two
tables are compared. By turns the whole process group is killed, or the parent alone, whose readers
then have to end by themselves. Figures go to ``soak.json``; the exit code is 1 if a row is missing,
doubled or wrong. Linux only.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch

from squid_fast import PRESETS, SQUID, Bundle, Discriminator, calibrate, save_bundle
from squid_fast.data import ImageSet
from squid_fast.screening import utf8_text

from ..arguments import add_option, add_output
from ..measurements import Results
from .images import ImageFolder, make_images

_MARK = "SQUID_FAST_SOAK"  # in the environment of all processes of a run
_TINY = PRESETS["small"].model | {"features_root": 4, "num_slots": 12, "memory_channel": 32}
_SAID = "said.txt"
_PATIENCE = 20.0  # seconds in which readers without a parent have to end

Process = subprocess.Popen[bytes]


@dataclass
class Soak:
    """What a soak did, and what was wrong: nothing where ``problems`` is empty."""

    seed: int
    files: int
    broken: int
    kills: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    errors: int = 0
    undisturbed_seconds: float = 0.0
    seconds: float = 0.0
    largest_difference: float = 0.0  # of two z-scores of the same file
    problems: list[str] = field(default_factory=list)


def soak(files: int, broken: float, kills: int, seed: int, folder: Path) -> Soak:
    """Make the images below ``folder``, screen them, and say what came of it."""
    generator = np.random.default_rng(seed)
    images = make_images(folder / "images", files, round(files * broken), generator)
    make_bundle(folder / "bundle", seed)
    result = Soak(seed, files, len(images.broken))
    whole, table = folder / "whole.parquet", folder / "killed.parquet"

    started = time.perf_counter()
    process, _ = start(folder, whole)
    finish(process, folder, result)
    result.undisturbed_seconds = round(time.perf_counter() - started, 1)

    started = time.perf_counter()
    orphans, done = "", 0
    targets = sorted(generator.integers(0, files, kills).tolist())
    while targets and not result.problems:
        process, mark = start(folder, table)
        wait_until_gone(orphans, result)
        how = ("group", "parent")[len(result.kills) % 2]
        if kill(process, table, targets[0], generator.uniform(0, 0.05), how):
            rows = rows_done(table)
            if rows < done and (journal_of(table) / "journal.sqlite").exists():
                result.problems.append(f"of {done} rows that were safe {rows} are left")
            result.kills.append({"killed": how, "rows_done": rows})
            done = rows
            del targets[0]
        else:  # it was done before the kill came, and the next run starts at the beginning
            finish(process, folder, result)
            done = 0
        orphans = mark
    process, mark = start(folder, table)
    wait_until_gone(orphans, result)
    finish(process, folder, result)
    wait_until_gone(mark, result)
    result.seconds = round(time.perf_counter() - started, 1)
    if not result.problems:
        check(images, whole, table, result)
    ours = {"images", "originals", "bundle", _SAID, whole.name, table.name}
    if left := {path.name for path in folder.iterdir()} - ours:
        result.problems.append(f"{sorted(left)} is left behind")
    return result


def make_bundle(folder: Path, seed: int) -> None:
    """A small model with random weights, calibrated on noise."""
    torch.manual_seed(seed)
    model, discriminator = SQUID(**_TINY), Discriminator(2)
    side = model.image_size
    noise = torch.randint(0, 256, (64, 1, side, side), dtype=torch.uint8)
    normal = ImageSet(noise, torch.zeros(64, dtype=torch.int64), list(map(str, range(64))))
    model.inpaint_block.memory.update()
    model.eval(), discriminator.eval()
    calibration = calibrate(model, discriminator, normal, normal, 0.05, "float32", "cpu")
    save_bundle(Bundle(model, discriminator, calibration, "patch_error"), folder)


def start(folder: Path, table: Path) -> tuple[Process, str]:
    """Start or resume a run in a process group of its own; its mark finds its processes."""
    mark = secrets.token_hex(8)
    arguments = [folder / "bundle", folder / "images", "--out", table, "--resume"]
    arguments += ["--precision", "float32", "--device", "cpu", "--workers", "2"]
    with open(folder / _SAID, "w") as said:  # a pipe would be broken by the kill
        command = [sys.executable, "-m", "squid_fast", "screen", *map(str, arguments)]
        how = {"env": os.environ | {_MARK: mark}, "stdout": subprocess.DEVNULL, "stderr": said}
        return subprocess.Popen(command, start_new_session=True, **how), mark


def kill(process: Process, table: Path, target: int, delay: float, how: str) -> bool:
    """Kill a run a moment after it has ``target`` rows; False if it ended before."""
    while process.poll() is None and rows_done(table) < target:
        time.sleep(0.005)
    time.sleep(delay)
    if process.poll() is not None:
        return False
    (os.killpg if how == "group" else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    return True


def finish(process: Process, folder: Path, result: Soak) -> None:
    """Let a run come to its end."""
    if process.wait() != 0:
        said = (folder / _SAID).read_text().strip()
        result.problems.append(f"a run ended with {process.returncode}: {said}")


def rows_done(table: Path) -> int:
    """Rows in the journal of an unfinished run, 0 if they cannot be read at the moment.

    They are read from a copy, since the run has locked its journal.
    """
    with tempfile.TemporaryDirectory() as copy:
        try:
            shutil.copytree(journal_of(table), copy, dirs_exist_ok=True)
            with closing(sqlite3.connect(Path(copy) / "journal.sqlite")) as journal:
                return int(journal.execute("SELECT count(*) FROM rows").fetchone()[0])
        except (OSError, sqlite3.Error):
            return 0


def journal_of(table: Path) -> Path:
    return table.with_name(f"{table.name}.partial")


def wait_until_gone(mark: str, result: Soak) -> None:
    """Give the processes of a killed run the time to end; one that does not is a problem."""
    deadline = time.monotonic() + _PATIENCE
    while mark and (left := marked(mark)):
        if time.monotonic() > deadline:
            result.problems.append(f"{len(left)} processes outlived their run: {left}")
            for number in left:
                os.kill(number, signal.SIGKILL)
            return
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """Processes whose environment has the mark."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is not ours
            if f"{_MARK}={mark}".encode() in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found


def check(images: ImageFolder, whole: Path, table: Path, result: Soak) -> None:
    """Compare the table of the killed run with the files and with the undisturbed run's."""
    rows = pyarrow.parquet.read_table(table).to_pylist()
    undisturbed = pyarrow.parquet.read_table(whole).to_pylist()
    result.rows, result.errors = len(rows), sum(row["error"] is not None for row in rows)
    problems = result.problems
    paths = [row["path"] for row in rows]
    if paths != list(map(utf8_text, images.files)):
        problems.append(
            f"the rows are not those of the files in their order: {len(rows)} rows for "
            f"{len(images.files)} files, {len(paths) - len(set(paths))} of them doubled"
        )
        return
    if wrong := {row["path"] for row in rows if row["error"]} ^ set(map(utf8_text, images.broken)):
        problems.append(f"{len(wrong)} files are errors and fine, or broken and scored: {wrong}")
        return
    scores: dict[Path, list[float]] = {}
    for path, row, other in zip(images.files, rows, undisturbed, strict=True):
        if path in images.originals:
            scores.setdefault(images.originals[path], []).extend((row["z_score"], other["z_score"]))
    result.largest_difference = max(max(found) - min(found) for found in scores.values())
    if result.largest_difference > 1e-4:
        problems.append(f"scores of the same image differ by {result.largest_difference}")
    if len({found[0] for found in scores.values()}) < 0.9 * len(scores):
        problems.append("different images have the same score, so that comparing them says little")
    if [row["flag"] for row in rows] != [row["flag"] for row in undisturbed]:
        problems.append("flags differ from those of the undisturbed run")


def add_arguments(parser: ArgumentParser) -> None:
    add_option(parser, "--files", 20_000, "Number of files")
    add_option(parser, "--broken", 0.05, "Share of the files that are broken")
    add_option(parser, "--kills", 5, "Number of kills")
    add_option(parser, "--seed", [0], "Seeds, each of them a soak")
    add_output(parser)


def main(options: Namespace) -> None:
    """Soak and write the results file; exit with 1 if something was wrong."""
    results = Results(options.output / "soak.json", torch.device("cpu"))
    soaks = results.figures["soaks"] = []
    for seed in options.seed:
        with tempfile.TemporaryDirectory() as folder:
            result = soak(options.files, options.broken, options.kills, seed, Path(folder))
        verdict = "failed" if result.problems else "every file once, in order"
        soaks.append(asdict(result) | {"verdict": verdict})
        print(json.dumps(soaks[-1], indent=2), flush=True)
    results.write()
    sys.exit(any(result["problems"] for result in soaks))
