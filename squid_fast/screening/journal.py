"""The journal of a screening run: an SQLite database in a folder beside the table.

A run that was stopped or killed is resumed from it. Its tables are ``run``, what is being run, as
one JSON object; ``files``, the listing, paths as bytes; and ``rows``, the rows so far in the order
of the listing, each as the JSON list of its fields. JSON as Python writes it keeps NaN, booleans
and file names that are not UTF-8; the types of SQLite do not.
"""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from .._version import __version__
from ..data.listing import LeftOut
from ..utils.atomic import sync_folder
from .pipeline import ScreenRow

_DATABASE = "journal.sqlite"
_FORMAT = 2
_SCHEMA = f"""
    BEGIN;
    PRAGMA user_version = {_FORMAT};
    CREATE TABLE run (record TEXT NOT NULL);
    CREATE TABLE files (number INTEGER PRIMARY KEY, path BLOB NOT NULL);
    CREATE TABLE rows (number INTEGER PRIMARY KEY, fields TEXT NOT NULL);
    COMMIT;
"""
_FOUND = """
    CREATE TABLE found (
        input INTEGER, matched BLOB, path BLOB, PRIMARY KEY (input, matched, path)
    ) WITHOUT ROWID
"""
_SORT = (  # what was found, each file once
    "CREATE UNIQUE INDEX once ON files (absolute(path))",
    "INSERT OR IGNORE INTO files (path) SELECT path FROM found ORDER BY input, matched, path",
    "DROP INDEX once",
    "DROP TABLE found",
)
_COUNTS = "SELECT count(*), coalesce(max(number), 0), (SELECT count(*) FROM files) FROM rows"
_AT_ONCE = 1000  # paths or rows that are read from the database together
_UNREADABLE = (sqlite3.Error, ValueError, TypeError, KeyError, RecursionError)

_row_fields = attrgetter(*(field.name for field in fields(ScreenRow)))


class JournalError(RuntimeError):
    """A run cannot be started, resumed or continued; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """What is being run. Rows of runs that differ in any of it do not belong in one table."""

    fingerprint: str
    score_name: str
    threshold: float
    inputs: list[str]  # the first of them, for messages
    inputs_sha256: str  # of all of them
    folder: str | None  # in which relative inputs start; None if all are absolute


class Journal:
    """An open journal, locked for this process.

    Leaving its block closes it, and removes it if it holds no run.

    Attributes:
        run: the unfinished run found in the folder, or the one that ``start`` began; else None.
        files: the listing, see ``find_files``. It stays in the database.
        packed: number of rows of each packed file, by its index in the listing.
        left_out: number of files that are no images and not in the listing, by kind.
        total: number of rows when the run is finished, ``count`` of which are in the journal.

    Raises:
        JournalError: from any method, if the folder cannot be read, written or locked, is in use,
            is damaged, or holds something other than a journal of this version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Run | None = None
        self.count = 0
        self.left_out: Counter[str] = Counter()
        self._synced = time.monotonic()
        with self._explained("cannot be written"):
            self._database = _open(folder)
        try:
            self._set_listing(0, {})
            self._recover()
        except BaseException:
            self._database.close()
            raise

    def start(
        self,
        run: Run,
        found: Iterable[tuple[int, str, str]],
        packed: Callable[[Collection[str]], Mapping[int, int]],
        left_out: LeftOut | None = None,
    ) -> None:
        """Begin a run; the database sorts ``found``, as ``search_files`` gives it, on the disk.

        Args:
            packed: returns the number of images in each packed file of a listing, by its index.
            left_out: what ``found`` leaves out.

        Raises:
            ValueError: a path cannot be the name of a file.
        """
        keys = ((index, _encoded(match), _encoded(path)) for index, match, path in found)
        with self._explained("cannot be written"):
            self._database.create_function("absolute", 1, _absolute, deterministic=True)
            with self._database as database:
                database.execute("BEGIN")
                database.execute(_FOUND)
                database.executemany("INSERT OR IGNORE INTO found VALUES (?, ?, ?)", keys)
                for statement in _SORT:
                    database.execute(statement)
                (count,) = database.execute("SELECT count(*) FROM files").fetchone()
                about = {"squid_fast": __version__, "run": asdict(run), "files": count}
                images = packed(_Listing(database, count))
                self.left_out = left_out.counts if left_out else Counter()
                about |= {"packed": sorted(images.items()), "left_out": self.left_out}
                record = json.dumps(about, allow_nan=False)
                database.execute("INSERT INTO run VALUES (?)", [record])
            sync_folder(self.folder.parent)
        self.run = run
        self._set_listing(count, images)

    def append(self, rows: Sequence[ScreenRow]) -> None:
        """Write the next rows in one transaction; raises RuntimeError if they are other rows."""
        for done, row in enumerate(rows, start=self.count):
            if done == self.total:
                raise RuntimeError(f"all {done} files have their rows, and then came {row.path!r}")
            wanted = next(self._expected)
            if wanted not in (None, row.path):
                raise RuntimeError(
                    f"there is a row for {row.path!r}, but the next file is {wanted!r}"
                )
        # A killed process loses no transaction, but a power cut loses those since the last one
        # that waited for the disk (FULL): one a second, for on a slow disk that takes as long as
        # scoring a batch. Closing the database waits for the disk, too.
        now = time.monotonic()
        wait = now - self._synced >= 1
        lines = ((json.dumps(_row_fields(row)),) for row in rows)
        with self._explained("cannot be written"):
            self._database.execute(f"PRAGMA synchronous = {'FULL' if wait else 'NORMAL'}")
            with self._database as database:
                database.executemany("INSERT INTO rows (fields) VALUES (?)", lines)
        self.count += len(rows)
        if wait:
            self._synced = now

    def rows(self) -> Iterator[ScreenRow]:
        """All rows, as a stream."""
        try:
            lines = _read(self._database, "SELECT fields FROM rows", self.count)
            for line, wanted in zip(lines, self._paths_of_rows(), strict=False):
                row = ScreenRow(*json.loads(line))
                if wanted not in (None, row.path):
                    raise ValueError(f"there is a row for {row.path!r} in place of {wanted!r}")
                yield row
        except _UNREADABLE as error:
            raise _damaged(self.folder, error) from error

    @property
    def paths(self) -> list[Path]:
        """All files that may lie in the folder."""
        return [self.folder / name for name in _names(self.folder)]

    def remove(self) -> None:
        """Remove the journal, for its rows are elsewhere now."""
        with closing(self._database), self._explained("is no longer needed, but cannot be removed"):
            if sys.platform == "win32":
                self._database.close()  # an open file cannot be removed there
            for path in self.paths:
                path.unlink(missing_ok=True)
            with suppress(OSError):  # a file manager or a network file system has left something
                self.folder.rmdir()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with closing(self._database):
            if self.run is None:
                self.remove()

    def failure(self, problem: str, error: OSError | sqlite3.Error) -> JournalError:
        """The error to raise when something of the run cannot be written."""
        safe = "No file has been scored yet."
        if self.run:
            safe = (
                f"{self.count:,} of {self.total:,} rows are safe in {str(self.folder)!r}; once it "
                "can be, go on with --resume."
            )
        return JournalError(f"{problem}: {getattr(error, 'strerror', None) or error}. {safe}")

    @contextmanager
    def _explained(self, problem: str) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise self.failure(f"{str(self.folder)!r} {problem}", error) from error

    def _set_listing(self, count: int, packed: Mapping[int, int]) -> None:
        self.files: Collection[str] = _Listing(self._database, count)
        self.packed = packed
        self.total = count + sum(packed.values()) - len(packed)
        self._expected = itertools.islice(self._paths_of_rows(), self.count, None)

    def _paths_of_rows(self) -> Iterator[str | None]:
        """The path of each row; None for those that only a packed file knows."""
        for index, path in enumerate(self.files):
            if index in self.packed:
                yield from itertools.repeat(None, self.packed[index])
            else:
                yield path

    def _recover(self) -> None:
        """Take up the unfinished run, if there is one."""
        try:
            record = self._database.execute("SELECT record FROM run").fetchone()
            if record is None:
                return
            (state,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise ValueError(" ".join(state.split()))
            saved = json.loads(record[0])
            self.count, last, files = self._database.execute(_COUNTS).fetchone()
            if (self.count, files) != (last, saved["files"]):
                raise ValueError("rows or files are missing in it")
            self._set_listing(files, dict(saved["packed"]))
            self.left_out = Counter(saved.get("left_out", {}))
            self.run = Run(**saved["run"])
        except _UNREADABLE as error:
            raise _damaged(self.folder, error) from error


class _Listing(Collection[str]):
    """The paths in a database, which are read as they are needed."""

    def __init__(self, database: sqlite3.Connection, count: int) -> None:
        self._database, self._count = database, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return map(_decoded, _read(self._database, "SELECT path FROM files", self._count))

    def __contains__(self, path: object) -> bool:
        return any(path == listed for listed in self)


def _read(database: sqlite3.Connection, query: str, count: int) -> Iterator[Any]:
    """The one column that a query gives for the first ``count`` records.

    Read in pieces: an open query keeps the database from being closed and its log from emptying.
    """
    query += " WHERE number > ? AND number <= ? ORDER BY number"
    for start in range(0, count, _AT_ONCE):
        for (value,) in database.execute(query, [start, min(start + _AT_ONCE, count)]).fetchall():
            yield value


def _open(folder: Path) -> sqlite3.Connection:
    """Open the database for this process alone, in a folder that may be new."""
    path = folder / _DATABASE
    while True:
        folder.mkdir(exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as stack:
            known = _names(folder)
            foreign = sorted(n for n in os.listdir(folder) if n not in known and n[0] != ".")
            if foreign:
                raise JournalError(
                    f"{str(folder)!r} holds {foreign[0]!r}, which is of no unfinished run of this "
                    "version of squid_fast. Unfinished results are kept in a folder of this name: "
                    "move it, or name another table."
                )
            path.touch()
            file = path.stat()
            database = stack.enter_context(closing(sqlite3.connect(path, timeout=0)))
            try:
                _lock(database, folder)
            finally:
                if not os.path.samestat(file, path.stat()):
                    raise FileNotFoundError
            stack.pop_all()
            return database
        # Another run has ended meanwhile and has removed the folder.


def _lock(database: sqlite3.Connection, folder: Path) -> None:
    """Lock the database until it is closed, and give it its tables if it is new."""
    try:
        # Locked so, a write-ahead log needs no shared memory, which a network drive lacks.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        is_new = database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if not is_new and version != _FORMAT:
            raise ValueError(f"its format is {version}, not {_FORMAT}")
        (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise sqlite3.OperationalError(f"SQLite takes the journal mode {mode!r}, not 'wal'")
        if is_new:
            database.executescript(_SCHEMA)
    except sqlite3.OperationalError as error:
        if "database is locked" in str(error):
            reason = (
                f"another process is writing {str(folder)!r}; wait for it to end, or name another "
                "table. If there is none, the file system has no locks, as some network drives"
            )
        else:
            reason = (
                f"{str(folder)!r} cannot be locked and written: {error}. Unfinished results need "
                "room on a file system with locks, which some network drives do not have"
            )
        raise JournalError(f"{reason}: name a table on a local disk.") from error
    except _UNREADABLE as error:
        raise _damaged(folder, error) from error


def _names(folder: Path) -> list[str]:
    """What a journal's folder may hold; the last is the table being written."""
    return [*(_DATABASE + suffix for suffix in ("", "-wal", "-shm", "-journal")), folder.stem]


def _damaged(folder: Path, error: Exception) -> JournalError:
    return JournalError(
        f"the unfinished run in {str(folder)!r} cannot be read: {error}. Delete the folder to "
        "start again from the beginning."
    )


def _encoded(path: str) -> bytes:
    """A path as UTF-8, in which also names that are not UTF-8 sort as in Python."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(f"{path!r} cannot be the name of a file") from error
    if "\0" in path:
        raise ValueError(f"{path!r} cannot be the name of a file: it holds a NUL")
    return path.encode("utf-8", "surrogatepass")


def _decoded(path: bytes) -> str:
    return path.decode("utf-8", "surrogatepass")


def _absolute(path: bytes) -> bytes:
    return os.path.abspath(_decoded(path)).encode("utf-8", "surrogatepass")
