"""Ctrl-C while the program starts, and standard streams that are closed or full."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")

import torch
from PIL import Image

from squid_fast import PRESETS, SQUID, Bundle, Discriminator, calibrate, save_bundle
from squid_fast.data import ImageSet
from tests.data import dicom_bytes as made

PROGRAM = [sys.executable, "-m", "squid_fast"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "model"
    pair = SQUID(**PRESETS["small"].model).eval(), Discriminator(2).eval()
    pixels = torch.randint(256, (20, 1, 48, 48), dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(20).long(), [""] * 20)
    save_bundle(Bundle(*pair, calibrate(*pair, images, device="cpu")), folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for level in range(12):
        Image.fromarray(np.full((48, 48), level, np.uint8)).save(folder / f"{level}.png")
    return folder


def test_ctrl_c_at_any_moment_is_one_line(bundle: Path, images: Path, tmp_path: Path) -> None:
    screen = ["screen", str(bundle), str(images), "--out", str(tmp_path / "r.csv"), "--resume"]
    export = ["export", str(bundle), "--out", str(tmp_path / "x.pt2")]
    for verb, delays in ((screen, (0.3, 0.8, 1.3, 1.6, 1.9)), (export, (1.5, 2.5))):
        for delay in delays:
            process = subprocess.Popen(
                [*PROGRAM, *verb], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the readers too
            _, said = process.communicate(timeout=120)
            assert process.returncode in (130, -signal.SIGINT, 0), said
            assert "Traceback" not in said
            assert "Error" not in said
            if process.returncode == 130:
                assert said == "squid-fast: interrupted\n" or "go on with --resume" in said
    assert not list(tmp_path.glob("*.new"))


def test_an_interrupt_that_a_library_turned_into_another_error(tmp_path: Path) -> None:
    program = f"""
import signal
from squid_fast.utils.program import end_on_interrupt
end_on_interrupt()
from squid_fast.cli import app, models
def listing(*arguments, **options):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise SystemError("initialization of _multiarray failed") from error
models.load_scorer = listing
app(["evaluate", {str(tmp_path)!r}, "--data", "x"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "squid-fast: interrupted\n")


def test_an_interrupt_while_python_ends_leaves_the_exit_code() -> None:
    program = """
import signal, squid_fast.__main__ as program, squid_fast.utils.program as utils
ignore = utils.ignore_interrupts
def interrupted():
    ignore()
    signal.raise_signal(signal.SIGINT)
utils.ignore_interrupts = program.ignore_interrupts = interrupted
program.main()
"""
    for arguments, code in (["--version"], 0), (["evaluate", "missing", "--data", "x"], 1):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code
        assert "interrupted" not in done.stderr


def test_an_interrupt_in_a_destructor_is_not_lost() -> None:
    program = """
import signal, time
from squid_fast.utils.program import interruptible
class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)
with interruptible() as interrupted:
    try:
        Late()
        for _ in range(1000):
            time.sleep(0.001)
    except KeyboardInterrupt:
        print("raised", interrupted())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("raised True\n", "", 0)


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&-", ">&-", "2>&-", "2>/dev/full"])
def test_work_is_done_whatever_is_closed(
    bundle: Path, images: Path, tmp_path: Path, closed: str
) -> None:
    table = tmp_path / "r.csv"
    words = [*PROGRAM, "screen", bundle, images, "--out", table, "--workers", 2, "--json"]
    command = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(table.read_text().splitlines()) == 13
    if ">&-" not in closed.split(" 2")[0].split():
        assert json.loads(done.stdout)["errors"] == 0
    assert "Traceback" not in done.stderr


def test_output_that_cannot_be_written_is_one_sentence(
    bundle: Path, images: Path, tmp_path: Path
) -> None:
    screen = " ".join(map(str, [*PROGRAM, "screen", bundle, images, "--json", "--out"]))
    for end, said in (
        (f"{tmp_path / 'a.csv'} >/dev/full", "No space left on device"),
        (f"{tmp_path / 'b.csv'} | true", ""),
    ):
        command = ["bash", "-o", "pipefail", "-c", f"{screen} {end}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if line.startswith("squid-fast:")]
        assert len(lines) == bool(said)
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "b.csv"]
    closed = f"{' '.join(PROGRAM)} screen {bundle} --list - --out {tmp_path / 'c.csv'} <&-"
    done = subprocess.run(closed, shell=True, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "squid-fast: the list is -, but standard input is closed; name a file, or pipe a list\n"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_libraries_print_nothing_in_between(tmp_path: Path, workers: int) -> None:
    pytest.importorskip("pydicom")
    pixels, folder = np.arange(64, dtype=np.uint8).reshape(8, 8), tmp_path / "images"
    folder.mkdir()
    # One literal run, and a byte too many, of which pydicom warns.
    coded = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x3f" + pixels.tobytes() + b"\0\0"
    made.write(
        folder / "a.dcm", pixels, None, "1.2.840.10008.1.2.5", pixels=made.fragments(coded), vr="OB"
    )
    if workers:  # libtiff prints on its own, which only a reader process can keep to itself
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "TIFF", compression="tiff_adobe_deflate")
        damaged = content.getvalue().replace(b"\x78\x9c", b"\xff\xff")
        assert damaged != content.getvalue()
        (folder / "b.tif").write_bytes(damaged)
    done = subprocess.run(
        [
            *PROGRAM,
            "pack",
            folder,
            "--out",
            tmp_path / "p",
            "--size",
            "8",
            "--workers",
            f"{workers}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not re.search("[Ww]arning|Decode|ZIP|pydicom", done.stderr), done.stderr
    assert done.returncode == 0
