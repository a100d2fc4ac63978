"""The journal: what is in it is right, whatever happened to the process or the disk."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from squid_fast.screening import JournalError, ScreenRow, journal, results, write_table
from squid_fast.screening.journal import Journal
from squid_fast.screening.journal_format import Run
from tests.screening.limits import file_size_limit
from tests.screening.test_results import FORMATS, read_table

RUN = Run("f1", "patch_error", 1.64, ["in"], "0" * 64, None)
STRANGE = os.fsdecode(b"caf\xe9/\xf0\x9f\xa9\xbb\n.png")
FILES = ["a.png", STRANGE, "c d.png", "", "e.png"]


def row(path: str, number: int) -> ScreenRow:
    if number % 3 == 1:
        return ScreenRow(path, None, None, None, None, 1.64, f"{path} is\u2028no image")
    return ScreenRow(path, number / 7, number - 1 / 3, 0.1, number > 1, 1.64, None)


ROWS = [row(path, number) for number, path in enumerate(FILES)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "r.csv.partial"


def begin(folder: Path, done: int) -> None:
    """A run that was killed after some rows."""
    with Journal(folder) as started:
        started.start(RUN, FILES, {})
        for item in ROWS[:done]:
            started.append(item)


def test_rows_come_back_as_they_were(folder: Path) -> None:
    begin(folder, 3)
    with Journal(folder) as found:
        assert (found.run, found.files) == (RUN, FILES)
        assert (found.count, found.total, found.dropped) == (3, 5, 0)
        assert list(found.rows()) == ROWS[:3]
        for item in ROWS[3:]:
            found.append(item)
        assert list(found.rows()) == ROWS
        assert found.count == 5
        found.remove()
    assert not folder.exists()


def test_a_batch_is_one_write_of_one_line_a_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(folder) as started:
        started.start(RUN, FILES, {})
        for item in ROWS[:3]:
            started.append(item)
        assert (folder / "rows.jsonl").read_bytes() == b""
        writes: list[int] = []
        write = started._file.write
        fake = type("File", (), {"write": lambda _, data: writes.append(len(data)) or write(data)})
        with monkeypatch.context() as patch:
            patch.setattr(started, "_file", fake())
            started.flush()
    content = (folder / "rows.jsonl").read_bytes()
    assert writes == [len(content)]
    assert content.startswith(b'["a.png", 0.0, -0.3333333333333333, 0.1, false, null]\n')
    assert content.count(b"\n") == 3
    assert content.isascii()


def test_rows_reach_the_disk_once_a_second_and_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, synced = 100.0, []
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    with Journal(folder) as started:
        started.start(RUN, FILES, {})
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(started.count))
        for item in ROWS:
            started.append(item)
            started.flush()
            now += 0.4
        assert synced == [4]  # the fourth is 1.2 s after the start
    assert synced == [4, 5]


TAILS = {
    "torn": (b'["e.png", 0.1, 0.2', 0),
    "torn before the line's end": (b'["e.png", 0.5, 0.5, 0.5, true, null]', 0),
    "zeros": (bytes(5000), 0),
    "zeros and lines": (bytes(50) + b'\n["e.png", 0.5, 0.5, 0.5, true, null]\n', 2),
    "not JSON": (b"what?\n", 1),
    "not ASCII": ("röntgen\n".encode(), 1),
    "a value is missing": (b'["", 0.5, 0.5, 0.5, true]\n', 1),
    "a score that is text": (b'["", "0.5", 0.5, 0.5, true, null]\n', 1),
    "scores and an error": (b'["", 0.5, 0.5, 0.5, true, "no"]\n', 1),
    "neither": (b'["", null, null, null, null, null]\n', 1),
    "another file's row": (b'["f.png", 0.5, 0.5, 0.5, true, null]\n', 1),
    "the row before": (b'["c d.png", 0.5, 0.5, 0.5, true, null]\n', 1),
    "an object": (b'{"path": ""}\n', 1),
    "a number": (b"5\n", 1),
    "deep": (b"[" * 200_000 + b"\n", 1),
    "empty lines": (b"\n\n\n", 3),
}


@pytest.mark.parametrize("name", TAILS)
def test_what_is_damaged_is_cut_off_and_scored_again(folder: Path, name: str) -> None:
    tail, dropped = TAILS[name]
    begin(folder, 3)
    lines = folder / "rows.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole + tail)
    with Journal(folder) as found:
        assert (found.count, found.dropped) == (3, dropped)
        assert lines.read_bytes() == whole
        for item in ROWS[3:]:
            found.append(item)
        assert list(found.rows()) == ROWS


@pytest.mark.parametrize("cut", range(0, 270, 13))
def test_a_kill_at_any_byte_loses_only_the_line_it_tore(folder: Path, cut: int) -> None:
    begin(folder, 5)
    lines = folder / "rows.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole[:cut])
    with Journal(folder) as found:
        assert found.count == whole[:cut].count(b"\n")
        for item in ROWS[found.count :]:
            found.append(item)
    assert lines.read_bytes() == whole


def test_damage_in_the_middle_drops_what_follows_and_counts_it(folder: Path) -> None:
    begin(folder, 5)
    lines = folder / "rows.jsonl"
    content = bytearray(lines.read_bytes())
    content[content.index(b"\n") + 5] = 0
    lines.write_bytes(content)
    with Journal(folder) as found:
        assert (found.count, found.dropped) == (1, 4)
        assert list(found.rows()) == ROWS[:1]


def test_rows_behind_the_last_file_are_dropped(folder: Path) -> None:
    begin(folder, 5)
    with open(folder / "rows.jsonl", "ab") as file:
        file.write(b'["e.png", 0.5, 0.5, 0.5, true, null]\n')
    with Journal(folder) as found:
        assert (found.count, found.dropped) == (5, 1)


@FORMATS
def test_rows_are_recovered_and_written_as_a_stream(
    folder: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the rows in memory would take four times what is allowed here."""
    count, some = 20_000, 1000
    monkeypatch.setattr(results, "_ROWS_AT_ONCE", some)
    with Journal(folder) as started:
        started.start(RUN, ["p.arrow"], {0: count})  # so that the listing itself is short
        for number in range(count):
            started.append(row(f"ward/{number:06d}.png", number))
            if number % 1000 == 0:
                started.flush()
    write_table(ROWS, folder.parent / f"r{suffix}")  # imports what it needs
    tracemalloc.start()
    try:
        with Journal(folder) as found:
            rows = list(itertools.islice(found.rows(), some))
        held = tracemalloc.get_traced_memory()[0] / some * count
        del rows
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        with Journal(folder) as found:
            write_table(found.rows(), folder.parent / f"r{suffix}")
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert held > 5e6
    assert peak < held / 4
    assert len(read_table(folder.parent / f"r{suffix}")) == count


def test_rows_of_packed_files_are_checked_by_their_number(folder: Path) -> None:
    files = ["a.png", "p.arrow", "none.arrow", "b.png"]
    rows = [row(path, 0) for path in ("a.png", "x", "y", "z", "b.png")]
    with Journal(folder) as started:
        started.start(RUN, files, {1: 3, 2: 0})
        assert started.total == 5
        for item in rows[:3]:
            started.append(item)
    with Journal(folder) as found:
        assert (found.count, found.total, found.packed) == (3, 5, {1: 3, 2: 0})
        for item in rows[3:]:
            found.append(item)
    with Journal(folder) as found:
        assert list(found.rows()) == rows
    lines = folder / "rows.jsonl"
    lines.write_bytes(lines.read_bytes().replace(b'["b.png"', b'["z"'))
    with Journal(folder) as found:
        assert (found.count, found.dropped) == (4, 1)


def test_rows_out_of_order_are_not_taken(folder: Path) -> None:
    with Journal(folder) as started:
        started.start(RUN, FILES, {})
        with pytest.raises(
            RuntimeError, match=r"row for 'c d\.png', but the next file is 'a\.png'"
        ):
            started.append(ROWS[2])
    folder.joinpath("run.json").unlink()
    begin(folder, 5)
    with Journal(folder) as found, pytest.raises(RuntimeError, match="all 5 files have their rows"):
        found.append(ROWS[4])


def test_only_one_process_writes(folder: Path) -> None:
    begin(folder, 2)
    with Journal(folder):
        with pytest.raises(JournalError, match=r"another process is writing '.*r\.csv\.partial'"):
            Journal(folder)
        code = (
            "import sys; from pathlib import Path; from squid_fast.screening.journal import Journal"
            "\nJournal(Path(sys.argv[1]))"
        )
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "JournalError: another process is writing" in done.stderr
    with Journal(folder) as found:
        assert found.count == 2


def test_a_folder_that_another_run_removes_meanwhile_is_made_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(folder, 2)
    flock = journal.fcntl.flock
    calls = []

    def late(file: object, operation: int) -> None:
        """The other run ends between our opening the file and our lock on it."""
        if not calls:
            for name in os.listdir(folder):
                (folder / name).unlink()
            folder.rmdir()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(journal.fcntl, "flock", late)
    with Journal(folder) as found:
        assert found.run is None
        found.start(RUN, FILES, {})
        found.append(ROWS[0])
    assert len(calls) == 2
    with Journal(folder) as found:
        assert found.count == 1


def test_a_file_system_without_locks_is_written_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(journal.fcntl, "flock", refuse)
    begin(folder, 2)
    with Journal(folder) as found:
        assert found.count == 2


def test_a_folder_without_run_json_is_no_run(folder: Path) -> None:
    begin(folder, 3)
    (folder / "run.json").unlink()  # the first that the end of a run removes
    (folder / "r.csv").write_text("half a table")
    with Journal(folder) as found:
        assert (found.run, found.count, found.total) == (None, 0, 0)
        assert sorted(os.listdir(folder)) == ["rows.jsonl"]
        assert (folder / "rows.jsonl").read_bytes() == b""
    assert not folder.exists()


def test_somebody_elses_folder_is_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(JournalError, match=r"holds 'thesis\.txt', which is of no unfinished run"):
        Journal(folder)
    assert os.listdir(folder) == ["thesis.txt"]


def test_hidden_files_neither_disturb_nor_are_removed(folder: Path) -> None:
    begin(folder, 1)
    (folder / ".DS_Store").touch()
    with Journal(folder) as found:
        assert found.count == 1
        found.remove()
    assert os.listdir(folder) == [".DS_Store"]


DAMAGED = {
    "empty run": ("run.json", lambda content: b"", "Expecting value"),
    "run without listing": ("run.json", lambda content: b'{"format": 1}', "'run'"),
    "run that is a list": ("run.json", lambda content: b"[]", "list indices"),
    "future": (
        "run.json",
        lambda content: json.dumps(json.loads(content) | {"format": 2}).encode(),
        "its format is 2, not 1",
    ),
    "listing": ("files.bin", lambda content: content[:-2], "its listing is damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_run_that_cannot_be_read_is_refused_and_kept(folder: Path, case: str) -> None:
    name, change, reason = DAMAGED[case]
    begin(folder, 3)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(JournalError, match=rf"cannot be read: .*{reason}.*Delete the folder"):
        Journal(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_missing_listing_is_refused(folder: Path) -> None:
    begin(folder, 3)
    (folder / "files.bin").unlink()
    with pytest.raises(JournalError, match="No such file or directory"):
        Journal(folder)


def test_names_that_no_file_can_have_are_refused_before_any_work(folder: Path) -> None:
    for name in ("nul\0byte.png", "lone \ud800.png"):
        with Journal(folder) as started, pytest.raises(ValueError, match="cannot be the name of a"):
            started.start(RUN, ["a.png", name], {})
        assert not folder.exists()


def test_full_disk_keeps_the_rows_before_and_no_torn_line(folder: Path) -> None:
    files = [f"{i}.png" for i in range(100)]
    with Journal(folder) as started:
        started.start(RUN, files, {})
        for number, path in enumerate(files[:20]):
            if number == 10:
                started.flush()
            started.append(row(path, number))
        size = os.path.getsize(folder / "rows.jsonl")
        with file_size_limit(size + 100), pytest.raises(JournalError) as raised:
            started.flush()
    assert str(raised.value) == (
        f"{str(folder)!r} cannot be written: File too large. 10 of 100 rows are safe in "
        f"{str(folder)!r}; once it can be, go on with --resume."
    )
    assert (folder / "rows.jsonl").read_bytes().count(b"\n") == 10
    assert (folder / "rows.jsonl").read_bytes().endswith(b"\n")
    with Journal(folder) as found:
        assert (found.count, found.dropped) == (10, 0)
        for number in range(10, 100):
            found.append(row(files[number], number))
        assert list(found.rows()) == [row(path, number) for number, path in enumerate(files)]


def test_full_disk_that_cannot_even_be_truncated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line stays, and the next start drops it."""
    begin(folder, 2)
    found = Journal(folder)
    with open(folder / "rows.jsonl", "ab", buffering=0) as real:

        class Full:
            def write(self, data: memoryview) -> int:
                if len(data) < 40:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real.write(data[: len(data) // 2])

            def truncate(self, size: int) -> None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        found.append(ROWS[2])
        with monkeypatch.context() as patch:
            patch.setattr(found, "_file", Full())
            with pytest.raises(JournalError, match=r"No space left on device\. 2 of 5 rows are"):
                found.flush()
    found._file.close()
    assert not (folder / "rows.jsonl").read_bytes().endswith(b"\n")
    with Journal(folder) as again:
        assert list(again.rows()) == ROWS[:2]


def test_full_disk_before_the_first_row_leaves_nothing(folder: Path) -> None:
    for limit in (20, 100):  # the listing does not fit, run.json does not
        with (
            pytest.raises(JournalError, match=r"File too large\. No file has been scored yet\."),
            Journal(folder) as started,
            file_size_limit(limit),
        ):
            started.start(RUN, FILES, {})
        assert not folder.exists()
