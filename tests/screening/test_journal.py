"""The journal: what is in it is right, whatever happened to the process or the disk."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from squid_fast.screening import JournalError, ScreenRow, journal, results, write_table
from squid_fast.screening.journal import Journal, Run
from tests.screening.limits import file_size_limit
from tests.screening.test_results import FORMATS, read_table

RUN = Run("f1", "patch_error", 1.64, ["in"], "0" * 64, None)
STRANGE = os.fsdecode(b"caf\xe9/\xf0\x9f\xa9\xbb\n.png")
FILES = ["a.png", STRANGE, "c d.png", "", "e.png"]


def row(path: str, number: int) -> ScreenRow:
    if number % 3 == 1:
        error, kind = f"{path} is\u2028no image", "… is\u2028no image"
        return ScreenRow(path, None, None, None, None, 1.64, error, kind)
    return ScreenRow(path, number / 7, number - 1 / 3, 0.1, number > 1, 1.64, None)


ROWS = [row(path, number) for number, path in enumerate(FILES)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "r.csv.partial"


def start(new: Journal, files: Iterable[str], packed: dict[int, int] | None = None) -> None:
    new.start(RUN, ((i, path, path) for i, path in enumerate(files)), lambda _: packed or {})


def begin(folder: Path, done: int) -> None:
    """A run that was killed after some rows."""
    with Journal(folder) as started:
        start(started, FILES)
        started.append(ROWS[:done])


def test_the_listing_is_sorted_and_holds_each_file_once(folder: Path) -> None:
    here = os.path.abspath("b.png")
    found = [(1, "*", here), (0, "z", "c.png"), (0, "d", "x"), (0, "d", STRANGE), (0, "d", "b.png")]
    with Journal(folder) as new:
        new.start(RUN, [*found, *found], lambda files: {len(files) - 1: 7})
        assert list(new.files) == ["b.png", STRANGE, "x", "c.png"]
        assert (new.packed, new.total) == ({3: 7}, 10)


def append_each(started: Journal, rows: list[ScreenRow]) -> None:
    for item in rows:
        started.append([item])


def change(folder: Path, *statements: str) -> None:
    """Change the database as somebody else could."""
    with closing(sqlite3.connect(folder / "journal.sqlite", isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_come_back_as_they_were(folder: Path) -> None:
    begin(folder, 3)
    with Journal(folder) as found:
        assert (found.run, list(found.files)) == (RUN, FILES)
        assert (found.count, found.total) == (3, 5)
        assert list(found.rows()) == ROWS[:3]
        found.append(ROWS[3:])
        assert list(found.rows()) == ROWS
        assert found.count == 5
        found.remove()
    assert not folder.exists()


def test_values_that_sqlite_does_not_know_come_back(folder: Path) -> None:
    odd = ScreenRow("a.png", math.nan, -math.inf, 1e-310, True, 1.64, None)
    with Journal(folder) as started:
        start(started, FILES[:2])
        other = ScreenRow(STRANGE, None, None, None, None, math.inf, f"no {STRANGE}\0")
        started.append([odd, other])
        first, second = started.rows()
    assert math.isnan(first.raw_score)
    assert (first.z_score, first.anomaly_score, first.flag) == (-math.inf, 1e-310, True)
    assert (second.path, second.error) == (STRANGE, f"no {STRANGE}\0")
    assert (second.flag, second.threshold) == (None, math.inf)


def test_the_listing_is_read_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_AT_ONCE", 3)
    files = [f"{i}.png" for i in range(10)]
    with Journal(folder) as started:
        start(started, iter(files))
        found = started.files
        assert len(found) == 10
        assert list(found) == list(found) == files
        assert "9.png" in found
        assert "10.png" not in found


def test_a_batch_is_one_transaction(folder: Path) -> None:
    with Journal(folder) as started:
        start(started, FILES)
        said: list[str] = []
        started._database.set_trace_callback(said.append)
        started.append(ROWS[:3])
        assert [said.count(word) for word in ("BEGIN ", "COMMIT")] == [1, 1]
        assert sum(line.startswith("INSERT INTO rows") for line in said) == 3
        started._database.set_trace_callback(None)


def test_rows_reach_the_disk_once_a_second_and_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, waited = 100.0, []
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    with Journal(folder) as started:
        assert started._database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        start(started, FILES)
        for item in ROWS:
            started.append([item])
            (mode,) = started._database.execute("PRAGMA synchronous").fetchone()
            waited.append(mode == 2)
            now += 0.4
        assert waited == [False, False, False, True, False]  # the fourth is 1.2 s after the start
        assert (folder / "journal.sqlite-wal").stat().st_size > 0
    assert os.listdir(folder) == ["journal.sqlite"]  # into which SQLite has put, synced, the log


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process leaves that is killed after five batches of one row."""
    folder = tmp_path_factory.mktemp("killed") / "r.csv.partial"
    with Journal(folder) as started:
        start(started, FILES)
        append_each(started, ROWS)
        shutil.copytree(folder, folder.with_name("left.partial"))
    return folder.with_name("left.partial")


def resume(folder: Path) -> int:
    """Go on with what is left of a run; returns the number of rows that were there."""
    with Journal(folder) as found:
        if found.run is None:
            start(found, FILES)
        assert (found.run, list(found.files)) == (RUN, FILES)
        done = found.count
        assert list(found.rows()) == ROWS[:done]
        found.append(ROWS[done:])
        assert list(found.rows()) == ROWS
    return done


def test_a_kill_at_any_byte_loses_only_the_batch_it_tore(killed: Path, folder: Path) -> None:
    size = (killed / "journal.sqlite-wal").stat().st_size
    done = []
    for cut in [*range(0, size, 1499), size]:
        shutil.copytree(killed, folder)
        os.truncate(folder / "journal.sqlite-wal", cut)
        done.append(resume(folder))
        shutil.rmtree(folder)
    assert done == sorted(done)
    assert set(done) == {0, 1, 2, 3, 4, 5}


def test_a_torn_end_of_the_log_is_left_out(killed: Path, folder: Path) -> None:
    log = (killed / "journal.sqlite-wal").read_bytes()
    for tail in (bytes(5000), b"what?" * 3000, log[32:8000]):
        shutil.copytree(killed, folder)
        (folder / "journal.sqlite-wal").write_bytes(log + tail)
        assert resume(folder) == 5
        shutil.rmtree(folder)
    damaged = bytearray(log)
    damaged[-4096 - 24 - 100] ^= 1  # in the last but one page
    shutil.copytree(killed, folder)
    (folder / "journal.sqlite-wal").write_bytes(damaged)
    assert resume(folder) < 5


def test_a_log_without_its_database_is_no_run(killed: Path, folder: Path) -> None:
    """The end of a run removes the database first."""
    shutil.copytree(killed, folder)
    (folder / "journal.sqlite").unlink()
    assert resume(folder) == 0


def test_a_kill_while_files_are_listed_leaves_no_run(folder: Path) -> None:
    left = folder.with_name("left.partial")

    def files() -> Iterator[str]:
        yield from (f"{'long' * 50}/{i}.png" for i in range(20_000))  # more than SQLite holds back
        shutil.copytree(folder, left)

    with Journal(folder) as started:
        start(started, files())
    assert (left / "journal.sqlite-wal").stat().st_size > 1e6
    assert resume(left) == 0


@FORMATS
def test_rows_are_recovered_and_written_as_a_stream(
    folder: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the rows in memory would take four times what is allowed here."""
    count, some = 20_000, 1000
    monkeypatch.setattr(results, "_ROWS_AT_ONCE", some)
    with Journal(folder) as started:
        start(started, ["p.arrow"], {0: count})  # so that the listing itself is short
        for first in range(0, count, some):
            part = range(first, first + some)
            started.append([row(f"ward/{number:06d}.png", number) for number in part])
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


def test_a_listing_is_never_in_memory_as_a_whole(folder: Path) -> None:
    count = 50_000
    tracemalloc.start()
    try:
        with Journal(folder) as started:
            start(started, (f"ward/{i:06d}.png" for i in range(count)))
            started.append([row("ward/000000.png", 0)])
        with Journal(folder) as found:
            assert sum(path.endswith("7.png") for path in found.files) == count / 10
            found.append([row("ward/000001.png", 1)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5e5  # a tenth of what the paths would take


def test_rows_of_packed_files_are_checked_by_their_number(folder: Path) -> None:
    files = ["a.png", "p.arrow", "none.arrow", "b.png"]
    rows = [row(path, 0) for path in ("a.png", "x", "y", "z", "b.png")]
    with Journal(folder) as started:
        start(started, files, {1: 3, 2: 0})
        assert started.total == 5
        started.append(rows[:3])
    with Journal(folder) as found:
        assert (found.count, found.total, found.packed) == (3, 5, {1: 3, 2: 0})
        found.append(rows[3:])
    with Journal(folder) as found:
        assert list(found.rows()) == rows
    change(folder, "UPDATE rows SET fields = replace(fields, 'b.png', 'z') WHERE number = 5")
    with Journal(folder) as found, pytest.raises(JournalError, match=r"'z' in place of 'b\.png'"):
        list(found.rows())


def test_rows_out_of_order_are_not_taken(folder: Path) -> None:
    with Journal(folder) as started:
        start(started, FILES)
        with pytest.raises(
            RuntimeError, match=r"row for 'c d\.png', but the next file is 'a\.png'"
        ):
            started.append(ROWS[2:])
    shutil.rmtree(folder)
    begin(folder, 5)
    with Journal(folder) as found, pytest.raises(RuntimeError, match="all 5 files have their rows"):
        found.append(ROWS[4:])


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


@pytest.mark.parametrize("another", [False, True])
def test_a_folder_that_another_run_removes_meanwhile_is_made_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, another: bool
) -> None:
    begin(folder, 2)
    connect = sqlite3.connect
    calls = []

    def late(path: Path, **options: Any) -> sqlite3.Connection:
        """The other run ends between our opening the file and our lock on it."""
        database = connect(path, **options)
        calls.append(path)
        if len(calls) == 1:
            shutil.rmtree(folder)
            if another:
                begin(folder, 4)
        return database

    monkeypatch.setattr(journal.sqlite3, "connect", late)
    with Journal(folder) as found:
        assert found.count == (4 if another else 0)
        if not another:
            start(found, FILES)
            found.append(ROWS[:4])
    assert len(calls) == (3 if another else 2)
    monkeypatch.undo()
    assert resume(folder) == 4


class NoLocks(sqlite3.Connection):
    """What SQLite says of some network file systems."""

    problem = ""

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        if statement == "PRAGMA journal_mode = WAL":
            if self.problem == "delete":  # it stays in the mode that it has
                return super().execute("SELECT 'delete'")
            raise sqlite3.OperationalError(self.problem)
        return super().execute(statement, *arguments)


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        ("database is locked", "another process is writing .* If there is none, the file system"),
        ("locking protocol", "cannot be locked and written: locking protocol"),
        ("disk I/O error", "cannot be locked and written: disk I/O error"),
        ("database or disk is full", "cannot be locked and written: database or disk is full"),
        ("delete", "SQLite takes the journal mode 'delete', not 'wal'"),
    ],
)
def test_a_file_system_without_locks_is_refused_at_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, problem: str, sentence: str
) -> None:
    begin(folder, 2)
    before = contents(folder)
    connect = sqlite3.connect
    monkeypatch.setattr(NoLocks, "problem", problem)
    with monkeypatch.context() as patch:
        patch.setattr(
            journal.sqlite3, "connect", lambda path, **_: connect(path, timeout=0, factory=NoLocks)
        )
        with pytest.raises(JournalError, match=f"{sentence}.*: name a table on a local disk"):
            Journal(folder)
    assert contents(folder) == before
    with Journal(folder) as found:
        assert found.count == 2


def test_a_database_without_a_run_is_no_run(folder: Path) -> None:
    folder.mkdir()
    (folder / "r.csv").write_text("half a table")
    with Journal(folder) as found:
        assert (found.run, found.count, found.total) == (None, 0, 0)
    assert not folder.exists()
    folder.mkdir()
    (folder / "journal.sqlite").touch()
    assert resume(folder) == 0


@pytest.mark.parametrize("names", [["thesis.txt"], ["files.bin", "rows.jsonl", "run.json"]])
def test_what_is_no_journal_of_this_version_is_left_alone(folder: Path, names: list[str]) -> None:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)
    before = contents(folder)
    with pytest.raises(JournalError, match=f"holds '{names[0]}', which is of no unfinished run of"):
        Journal(folder)
    assert contents(folder) == before


def test_hidden_files_neither_disturb_nor_are_removed(folder: Path) -> None:
    begin(folder, 1)
    (folder / ".DS_Store").touch()
    with Journal(folder) as found:
        assert found.count == 1
        found.remove()
    assert os.listdir(folder) == [".DS_Store"]


def rewrite(way: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        database = folder / "journal.sqlite"
        database.write_bytes(way(database.read_bytes()))

    return apply


def statement(text: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, text)


DAMAGED = {
    "no database": (rewrite(lambda content: b"what?" * 1000), "file is not a database"),
    "cut short": (rewrite(lambda content: content[:-5000]), "malformed"),
    "pages of zeros": (rewrite(lambda content: content[:4096] + bytes(16384)), "malformed"),
    "a page of zeros": (
        rewrite(lambda content: content[:-4096] + bytes(4096)),
        "error|Tree|Page|freelist",
    ),
    "future": (statement("PRAGMA user_version = 3"), "its format is 3, not 2"),
    "foreign": (statement("PRAGMA user_version = 0"), "its format is 0, not 2"),
    "no tables": (statement("DROP TABLE run"), "no such table: run"),
    "a row less": (statement("DELETE FROM rows WHERE number = 2"), "rows or files are missing"),
    "a file less": (statement("DELETE FROM files WHERE number = 2"), "rows or files are missing"),
    "empty run": (statement("UPDATE run SET record = ''"), "Expecting value"),
    "run without listing": (statement("UPDATE run SET record = '{}'"), "'files'"),
    "run that is a list": (statement("UPDATE run SET record = '[]'"), "list indices"),
    "run of more": (
        statement("UPDATE run SET record = replace(record, 'score_name', 'score')"),
        "unexpected keyword argument 'score'",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_run_that_cannot_be_read_is_refused_and_kept(folder: Path, case: str) -> None:
    damage, reason = DAMAGED[case]
    begin(folder, 3)
    damage(folder)
    before = contents(folder)
    with pytest.raises(JournalError, match=rf"cannot be read: .*({reason}).*Delete the folder"):
        Journal(folder)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "fields", ["", "{}", "5", '["", 0.5]', '["f.png", 1, 1, 1, true, 1, null]', "[" * 5000]
)
def test_a_row_that_is_damaged_is_found_before_it_is_in_a_table(folder: Path, fields: str) -> None:
    begin(folder, 5)
    change(folder, f"UPDATE rows SET fields = '{fields}' WHERE number = 4")
    with Journal(folder) as found:
        rows = found.rows()
        assert [next(rows) for _ in range(3)] == ROWS[:3]
        with pytest.raises(JournalError, match=r"cannot be read: .*Delete the folder"):
            next(rows)


def test_names_that_no_file_can_have_are_refused_before_any_work(folder: Path) -> None:
    for name in ("nul\0byte.png", "lone \ud800.png"):
        with Journal(folder) as started, pytest.raises(ValueError, match="cannot be the name of a"):
            start(started, ["a.png", name])
        assert not folder.exists()


@pytest.mark.parametrize("room", [0, 100, 9000, 20_000])
def test_full_disk_keeps_the_rows_before(folder: Path, room: int) -> None:
    files = [f"{i}.png" for i in range(1000)]
    rows = [row(path, number) for number, path in enumerate(files)]
    with Journal(folder) as started:
        start(started, files)
        started.append(rows[:10])
        size = os.path.getsize(folder / "journal.sqlite-wal")
        with file_size_limit(size + room), pytest.raises(JournalError) as raised:
            append_each(started, rows[10:])
        done = started.count
    assert 10 <= done < 100
    assert (done > 10) == (room > 5000)
    assert str(raised.value) == (
        f"{str(folder)!r} cannot be written: disk I/O error. {done} of 1,000 rows are safe in "
        f"{str(folder)!r}; once it can be, go on with --resume."
    )
    with Journal(folder) as found:
        assert found.count == done
        found.append(rows[done:])
        assert list(found.rows()) == rows


def test_full_disk_when_the_journal_is_closed(folder: Path) -> None:
    """The log stays, for the database has no room for it."""
    files = [f"{i}.png" for i in range(1000)]
    rows = [row(path, number) for number, path in enumerate(files)]
    with ExitStack() as limit, Journal(folder) as started:
        start(started, files)
        started.append(rows[:500])
        size = os.path.getsize(folder / "journal.sqlite")
        limit.enter_context(file_size_limit(size))
    assert (folder / "journal.sqlite-wal").exists()
    with Journal(folder) as found:
        assert found.count == 500
        assert list(found.rows()) == rows[:500]


def test_full_disk_before_the_first_row_leaves_nothing(folder: Path) -> None:
    for limit in (20, 30_000):  # nothing can be written, the listing does not fit
        with (
            pytest.raises(JournalError, match=r"disk I/O error\. No file has been scored yet\."),
            Journal(folder) as started,
            file_size_limit(limit),
        ):
            start(started, FILES * 1000)
        assert not folder.exists()


def test_full_disk_at_the_start(folder: Path) -> None:
    with file_size_limit(100), pytest.raises(JournalError, match=r"disk I/O error.* need room"):
        Journal(folder)
    assert resume(folder) == 0
