"""Readers: what becomes of files, and of processes, when decoders crash, hang and swell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from squid_fast.data import Record, load_images
from squid_fast.screening.reading import worker as reader
from squid_fast.screening.reading.pool import read_ahead
from squid_fast.screening.reading.worker import Decoded

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")

SIZE = 16

# Python runs a module of this name when it starts. It makes a decoder do what the name of the file
# says, and keeps a list of what was decoded.
FAULTS = """
import os, re, signal
import PIL.Image

true_open = PIL.Image.open

def open(file, *args, **kwargs):
    folder, name = os.path.split(file.name)
    with __builtins__["open"](os.environ["DECODED"], "a") as log:
        print(name, file=log)
    if name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("once") and not os.path.exists(file.name + ".was-here"):
        __builtins__["open"](file.name + ".was-here", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("hang"):
        re.match("(a+)+b", "a" * 100)  # for ever, and no other thread runs meanwhile
    if name.startswith("stop"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if name.startswith("print"):
        print("a line", flush=True)
        os.write(1, b"and another" + bytes([10]))
    if name.startswith("alloc"):
        bytearray(5 << 30)
    return true_open(file, *args, **kwargs)

PIL.Image.open = open
"""


@pytest.fixture
def decoded_names(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[str]]:
    """Puts the faults into processes that are started; gives what they have decoded so far."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "sitecustomize.py").write_text(FAULTS)
    log = folder / "log"
    log.touch()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("DECODED", str(log))
    return lambda: log.read_text().split()


def write_images(folder: Path, names: list[str], size: int = SIZE) -> list[str]:
    """PNGs whose grey level is their number in the list."""
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{name}.png") for name in names]
    for level, path in enumerate(paths):
        Image.fromarray(np.full((size, size), level, dtype=np.uint8)).save(path)
    return paths


def check(decoded: list[Decoded], paths: list[str], errors: dict[str, str]) -> None:
    """Every path once, in order, with its grey level or the error expected for its name."""
    assert [item.path for item in decoded] == paths
    for level, (path, image, error, kind) in enumerate(decoded):
        reason = errors.get(Path(path).stem)
        if reason is None:
            assert image is not None, error
            assert error is kind is None
            np.testing.assert_array_equal(image, np.full((SIZE, SIZE), level))
            assert image.dtype == np.uint8
        else:
            assert image is None
            assert error is not None
            assert path in error
            assert reason in error
            assert kind == error.replace(path, "the file")


def children() -> set[int]:
    """Processes of this one, those that have ended but were not waited for included."""
    return children_of(os.getpid())


def children_of(parent: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.add(int(stat.parent.name))
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("look_ahead", [1, 7, None])
def test_order_and_pixels(tmp_path: Path, workers: int, look_ahead: int | None) -> None:
    paths = write_images(tmp_path, [f"a{i}" for i in range(40)])
    noise = np.random.default_rng(0).integers(0, 65536, (50, 30)).astype(np.uint16)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    paths.append(str(tmp_path / "noise.png"))
    decoded = list(read_ahead(paths, SIZE, workers, look_ahead))
    check(decoded[:-1], paths[:-1], {})
    # Files give a scorer the same bytes here, in evaluation and in training.
    expected = load_images([Record(Path(paths[-1]), None, None)], SIZE).images[0, 0].numpy()
    np.testing.assert_array_equal(decoded[-1].image, expected)
    assert list(read_ahead([], SIZE, workers, look_ahead)) == []


def test_images_are_the_callers(tmp_path: Path) -> None:
    """The memory they come through is used again."""
    paths = write_images(tmp_path, [f"a{i}" for i in range(20)])
    check(list(read_ahead(paths, SIZE, workers=1, look_ahead=2)), paths, {})


def test_names_of_every_kind(tmp_path: Path) -> None:
    write_images(tmp_path, ["plain"])
    image = (tmp_path / "plain.png").read_bytes()
    good = [os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png"), str(tmp_path / "a\nb c.png")]
    for path in good:
        Path(path).write_bytes(image)
    bad = [f"{tmp_path}/nul\0.png", f"{tmp_path}/\ud800.png", f"{tmp_path}/{'n' * 5000}.png", ""]
    decoded = list(read_ahead([*good, *bad], SIZE, workers=2))
    assert [item.path for item in decoded] == [*good, *bad]
    assert all(item.image is not None and not item.image.any() for item in decoded[:2])
    assert all(len(item.error or "") > 15 and item.error_kind for item in decoded[2:])
    assert decoded == decoded_here(decoded, [*good, *bad])


def decoded_here(like: list[Decoded], paths: list[str]) -> list[Decoded]:
    """The same without processes, arrays that are equal taken from ``like``."""
    here = list(read_ahead(paths, SIZE, workers=0))
    return [
        a if b.image is not None and np.array_equal(a.image, b.image) else b  # type: ignore[arg-type]
        for a, b in zip(like, here, strict=True)
    ]


def test_a_crash_costs_the_file_that_crashes(
    tmp_path: Path, decoded_names: Callable[[], list[str]]
) -> None:
    names = [f"a{i}" for i in range(60)]
    for number, name in {0: "crash0", 17: "crash1", 18: "crash2", 40: "once", 59: "crash3"}.items():
        names[number] = name
    paths = write_images(tmp_path, names)
    before = children()
    decoded = list(read_ahead(paths, SIZE, workers=2))
    reason = "kills the process that decodes it, twice now (Segmentation fault)"
    check(decoded, paths, {f"crash{i}": reason for i in range(4)})
    # A file by which a process died is tried twice, and no other file is.
    counts = {name: decoded_names().count(f"{name}.png") for name in names}
    assert {name for name, count in counts.items() if count == 2} == {
        *(f"crash{i}" for i in range(4)),
        "once",
    }
    assert set(counts.values()) == {1, 2}
    assert children() == before


@pytest.mark.usefixtures("decoded_names")
def test_a_hang_ends_after_the_timeout(tmp_path: Path) -> None:
    paths = write_images(tmp_path, ["a0", "hang1", "a2", "a3", "stop4", "a5", "a6", "a7"])
    start = time.monotonic()
    decoded = list(read_ahead(paths, SIZE, workers=1, timeout=0.7))
    assert time.monotonic() - start > 1.4
    reason = "was not decoded within 0.7 s"
    check(decoded, paths, {"hang1": reason, "stop4": reason})


@pytest.mark.usefixtures("decoded_names")
def test_what_decoders_print_is_no_answer(tmp_path: Path) -> None:
    paths = write_images(tmp_path, ["a0", "print1", "a2"])
    check(list(read_ahead(paths, SIZE, workers=1)), paths, {})


@pytest.mark.usefixtures("decoded_names")
def test_memory_is_limited(tmp_path: Path) -> None:
    paths = write_images(tmp_path, ["a0", "alloc1", "a2"])
    decoded = list(read_ahead(paths, SIZE, workers=1))
    check(decoded, paths, {"alloc1": "takes more memory to decode than there is"})


def test_a_bomb_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_images(tmp_path, ["a0", "bomb", "a2"])
    Image.new("RGBA", (6000, 6000)).save(paths[1], compress_level=1)
    monkeypatch.setattr(reader, "_MAX_MEMORY", 256 << 20)
    decoded = list(read_ahead(paths, SIZE, workers=1))
    check(decoded, paths, {"bomb": "takes more memory to decode than there is"})


def test_processes_killed_from_outside_cost_nothing(tmp_path: Path) -> None:
    paths = write_images(tmp_path, [f"a{i}" for i in range(100)])
    before, decoded, killed = children(), [], 0
    for number, item in enumerate(read_ahead(paths, SIZE, workers=2, look_ahead=10)):
        decoded.append(item)
        if number in (5, 40, 80):
            for pid in children() - before:
                os.kill(pid, signal.SIGKILL)
                killed += 1
    check(decoded, paths, {})
    assert killed >= 5
    assert children() == before


def test_a_busy_caller_is_no_hang(tmp_path: Path) -> None:
    paths = write_images(tmp_path, [f"a{i}" for i in range(6)])
    decoded = []
    for item in read_ahead(paths, SIZE, workers=2, look_ahead=2, timeout=0.5):
        decoded.append(item)
        time.sleep(0.8)
    check(decoded, paths, {})


def test_decoding_goes_on_while_the_caller_is_busy(
    tmp_path: Path, decoded_names: Callable[[], list[str]]
) -> None:
    """As far as look_ahead, though a pipe would not hold the images; and no further."""
    names = [f"a{i}" for i in range(100)]
    paths = write_images(tmp_path, names, size=256)
    readings = read_ahead(paths, 256, workers=2, look_ahead=40)
    next(readings)
    wait_until(lambda: len(decoded_names()) == 40)
    time.sleep(0.3)
    assert len(decoded_names()) == 40
    for number, item in enumerate(readings, start=1):
        assert item.image is not None
        assert (item.image == number).all()
        assert len(decoded_names()) <= number + 40
    assert sorted(decoded_names()) == sorted(f"{name}.png" for name in names)


@pytest.mark.usefixtures("decoded_names")
def test_paths_that_fill_a_pipe_do_not_block(tmp_path: Path) -> None:
    folder = tmp_path
    while len(bytes(folder)) < 3500:
        folder = folder / ("d" * 250)
    folder.mkdir(parents=True)
    (good,) = write_images(folder, ["good"])
    (bad,) = write_images(folder, ["hang"])
    paths = [bad, *[good] * 60]
    start = time.monotonic()
    decoded = list(read_ahead(paths, SIZE, workers=1, look_ahead=61, timeout=1))
    assert time.monotonic() - start < 30
    assert [item.path for item in decoded] == paths
    assert "not decoded within 1 s" in str(decoded[0].error)
    assert all(item.image is not None for item in decoded[1:])


@pytest.mark.usefixtures("decoded_names")
def test_closing_ends_processes_at_once(tmp_path: Path) -> None:
    paths = write_images(tmp_path, ["a0", *[f"hang{i}" for i in range(9)]])
    before, files = children(), open_files()
    readings = read_ahead(paths, SIZE, workers=3, timeout=100)
    next(readings)
    assert len(children() - before) == 3
    start = time.monotonic()
    readings.close()
    assert time.monotonic() - start < 2
    assert children() == before
    assert open_files() == files


def test_few_files_start_few_processes(tmp_path: Path) -> None:
    paths = write_images(tmp_path, ["a0", "a1"])
    before = children()
    with closing(read_ahead(paths, SIZE, workers=8)) as readings:
        next(readings)
        assert len(children() - before) <= 2


def test_processes_that_never_start_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_images(tmp_path, [f"a{i}" for i in range(5)])
    before, files = children(), open_files()
    monkeypatch.setattr(reader, "_PROGRAM", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"end before they begin \(exit code 3\).*workers=0"):
        list(read_ahead(paths, SIZE, workers=2))
    monkeypatch.setattr(reader, "_PROGRAM", "import time; time.sleep(100)")
    monkeypatch.setattr(reader, "_START_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match=r"end before they begin \(Killed\)"):
        list(read_ahead(paths, SIZE, workers=2, timeout=0.1))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    with pytest.raises(RuntimeError, match=r"can be started .*fewer workers"):
        list(read_ahead(paths, SIZE, workers=2))
    assert children() == before
    assert open_files() == files


def test_arguments_are_checked_at_the_call() -> None:
    for arguments, reason in (
        ({"size": 0}, "size must be at least 1, not 0"),
        ({"workers": -1}, "workers must be at least 0, not -1"),
        ({"workers": 100_000}, "workers must be at most 1024, not 100000"),
        ({"look_ahead": 0}, "look_ahead must be at least 1, not 0"),
        ({"timeout": 0}, "timeout must be more than 0 and at most 1e6 seconds, not 0"),
        ({"timeout": float("nan")}, "not nan"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_ahead([], **{"size": 8, **arguments})  # type: ignore[arg-type]


# Whole programs

PROGRAM = """
import sys
from squid_fast.screening.reading.pool import read_ahead

paths = sys.argv[1:]
readings = read_ahead(paths, 16, workers=2, timeout=1)
print(sum(int(item.image[0, 0]) for item in readings), flush=True)
print(*sorted(name for name in sys.modules if name in ("torch", "torchvision")))
"""


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """Neither the script nor what lies in the working directory is run by the processes."""
    paths = write_images(tmp_path / "images", [f"a{i}" for i in range(20)])
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "main.py").write_text(PROGRAM)
    for name in ("numpy", "PIL", "signal", "squid_fast"):
        (tmp_path / "images" / f"{name}.py").write_text("raise SystemExit('run by mistake')")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script" / "main.py"), *paths],
        cwd=tmp_path / "images",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == f"{sum(range(20))}\n\n", done.stderr
    assert done.stderr == ""


WAITING = """
import signal, sys, time
from squid_fast.screening.reading.pool import read_ahead

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
readings = read_ahead(sys.argv[1:], 16, workers=2, timeout=1)
next(readings)
try:
    print("ready", flush=True)  # from here on an interrupt may come
    time.sleep(100)
except KeyboardInterrupt:
    readings.close()
    print("interrupted", flush=True)
"""


@pytest.mark.usefixtures("decoded_names")
@pytest.mark.parametrize("last", ["a9", "hang"])
def test_processes_end_when_this_one_is_killed(tmp_path: Path, last: str) -> None:
    paths = write_images(tmp_path, [*[f"a{i}" for i in range(9)], last])
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, *paths], stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        readers = children_of(program.pid)
        assert len(readers) == 2
        program.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in readers), 10)


def test_an_interrupt_is_for_this_process_alone(tmp_path: Path) -> None:
    paths = write_images(tmp_path, [f"a{i}" for i in range(9)])
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, *paths],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == "ready\n"
        readers = children_of(program.pid)
        os.killpg(program.pid, signal.SIGINT)  # as the terminal does
        assert program.stdout.read() == "interrupted\n"
        assert program.stderr.read() == ""
    assert program.returncode == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in readers)
