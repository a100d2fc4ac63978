"""The journal of a screening run: its rows until the table can be made of them.

It is a folder, so that a run that was killed can go on where it was:

- ``run.json``: what is being run. Written last and removed first: a folder without is no run.
- ``files.bin``: the listing, paths as bytes, each ended by a NUL.
- ``rows.jsonl``: one line for each row so far, in the order of the listing:
  ``[path, raw_score, z_score, anomaly_score, flag, error]``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from ..utils.atomic import replacing, sync_folder, write_json
from .journal_format import JournalError, Run, listing_bytes, parse_line, paths_of_rows, row_line
from .pipeline import ScreenRow

if sys.platform != "win32":
    import fcntl

_FORMAT = 1
_RUN, _FILES, _ROWS = "run.json", "files.bin", "rows.jsonl"
_LONGEST_LINE = 1 << 20  # bytes; what a power cut leaves may have no line ends at all


class Journal:
    """A journal that is open, for this process alone.

    ``run`` is None until `start` unless the folder holds an unfinished run; then it is as that run
    left it, up to the first row that is torn or damaged.

    Args:
        folder: created where it is missing; what is in it must be of a journal.

    Attributes:
        folder: the journal's place.
        run: what is being run, or None.
        files: the listing, see `find_files`.
        packed: for items of the listing that stand for any number of rows, that number, by index.
        count: rows in the journal.
        total: rows when the run is finished.
        dropped: whole lines that stood behind a damaged one and are to be scored again.

    Raises:
        JournalError: the folder cannot be written, is in use, or holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Run | None = None
        self.count = self.dropped = 0
        self._size = 0  # bytes of rows.jsonl that hold whole rows
        self._lines: list[bytes] = []  # appended, not yet written
        self._synced = time.monotonic()
        with self._explained("cannot be written"):
            self._file = _claim(folder)
        try:
            self._set_listing([], {})
            if (folder / _RUN).exists():
                self._recover()
            else:  # what a start or an end that was cut short has left
                self._unlink(*_names(folder))
                self._file.truncate(0)
        except BaseException:
            self._file.close()
            raise

    def start(self, run: Run, files: Sequence[str], packed: Mapping[int, int]) -> None:
        """Begin a run.

        Raises:
            ValueError: a path that no file system can hold.
            JournalError: the journal cannot be written.
        """
        from .._version import __version__ as version  # the package itself imports this module

        listing = listing_bytes(files)
        listed = {
            "files": len(files),
            "sha256": hashlib.sha256(listing).hexdigest(),
            "packed": sorted(packed.items()),
        }
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about = {"format": _FORMAT, "squid_fast": version, "started": started}
        with self._explained("cannot be written"):
            with replacing(self.folder / _FILES) as file:
                file.write(listing)
            write_json(about | {"run": asdict(run), "listing": listed}, self.folder / _RUN)
            sync_folder(self.folder.parent)
        self.run = run
        self._set_listing(files, packed)

    def append(self, row: ScreenRow) -> None:
        """Take the next row; `flush` writes it.

        Raises:
            RuntimeError: the row is not that of the next file.
        """
        done = self.count + len(self._lines)
        if done == self.total:
            raise RuntimeError(f"all {done} files have their rows, and then came {row.path!r}")
        wanted = next(self._expected)
        if wanted not in (None, row.path):
            raise RuntimeError(f"there is a row for {row.path!r}, but the next file is {wanted!r}")
        self._lines.append(row_line(row))

    def flush(self, sync: bool = False) -> None:
        """Write what was appended; it reaches the disk at once a second, or now with ``sync``.

        Raises:
            JournalError: it cannot be written; what was written before is as it was.
        """
        lines, self._lines = self._lines, []
        data = b"".join(lines)
        with self._explained("cannot be written"):
            try:
                rest = memoryview(data)
                while rest:  # a disk that is nearly full takes a part
                    rest = rest[self._file.write(rest) or 0 :]
            except OSError:
                with suppress(OSError):  # else the next start drops the torn line
                    self._file.truncate(self._size)
                raise
            self._size += len(data)
            self.count += len(lines)
            if sync or time.monotonic() - self._synced >= 1:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def rows(self) -> Iterator[ScreenRow]:
        """All rows, as a stream."""
        assert self.run is not None
        self.flush()
        with open(self.folder / _ROWS, "rb") as file:
            for line in file:
                path, raw, z, anomaly, flag, error = parse_line(line)
                yield ScreenRow(path, raw, z, anomaly, flag, self.run.threshold, error)

    def remove(self) -> None:
        """Remove the journal, for its rows are elsewhere now."""
        with self._explained("is no longer needed, but cannot be removed"):
            self._unlink(*_names(self.folder))
            if sys.platform == "win32":
                self._file.close()  # an open file cannot be removed there
            self._unlink(_ROWS)
        with suppress(OSError):  # a file manager or a network file system has left something
            self.folder.rmdir()
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file.closed:
            return
        try:
            if self.run is None:
                self.remove()
            else:
                self.flush(sync=True)
        finally:
            self._file.close()

    @contextmanager
    def _explained(self, problem: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.failure(f"{str(self.folder)!r} {problem}", error) from error

    def failure(self, problem: str, error: OSError) -> JournalError:
        """What to raise when something of the run cannot be written."""
        reason = f"{problem}: {error.strerror or error}."
        if not self.run:
            return JournalError(f"{reason} No file has been scored yet.")
        return JournalError(
            f"{reason} {self.count:,} of {self.total:,} rows are safe in {str(self.folder)!r}; "
            "once it can be, go on with --resume."
        )

    def _set_listing(self, files: Sequence[str], packed: Mapping[int, int]) -> None:
        self.files, self.packed = files, packed
        self.total = len(files) + sum(packed.values()) - len(packed)
        self._expected = paths_of_rows(files, packed)

    def _recover(self) -> None:
        self.run, listed = self._read_run()
        try:
            listing = (self.folder / _FILES).read_bytes()
            if hashlib.sha256(listing).hexdigest() != listed["sha256"]:
                raise ValueError("its listing is damaged")
            packed = {int(index): int(rows) for index, rows in listed["packed"]}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._damaged(error) from error
        self._set_listing(os.fsdecode(listing).split("\0")[:-1], packed)
        with open(self.folder / _ROWS, "rb") as file:
            for wanted in self._expected:
                line = file.readline(_LONGEST_LINE)
                try:
                    path = parse_line(line)[0]
                except ValueError:
                    break
                if wanted not in (None, path):
                    break
                self.count += 1
                self._size += len(line)
            file.seek(self._size)
            while block := file.read(_LONGEST_LINE):
                self.dropped += block.count(b"\n")
        with self._explained("cannot be written"):
            self._file.truncate(self._size)
        self._expected = itertools.islice(paths_of_rows(self.files, packed), self.count, None)

    def _read_run(self) -> tuple[Run, dict[str, Any]]:
        try:
            saved = json.loads((self.folder / _RUN).read_bytes())
            if saved["format"] != _FORMAT:
                raise ValueError(f"its format is {saved['format']!r}, not {_FORMAT}")
            return Run(**saved["run"]), saved["listing"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> JournalError:
        return JournalError(
            f"the unfinished run in {str(self.folder)!r} cannot be read: {error}. Delete the "
            "folder to start again from the beginning."
        )

    def _unlink(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    """What a journal's folder may hold besides the rows; the last is the table being written."""
    return [_RUN, _FILES, f"{_RUN}.new", f"{_FILES}.new", folder.stem]


def _claim(folder: Path) -> FileIO:
    """Open the rows for appending, for this process alone, in a folder that may be new."""
    known = {_ROWS, *_names(folder)}
    while True:
        folder.mkdir(exist_ok=True)
        try:
            foreign = sorted(n for n in os.listdir(folder) if n not in known and n[0] != ".")
            if foreign:
                raise JournalError(
                    f"{str(folder)!r} holds {foreign[0]!r}, which is of no unfinished run. "
                    "Unfinished results are kept in a folder of this name: move it, or name "
                    "another table."
                )
            file = FileIO(folder / _ROWS, "a")
        except FileNotFoundError:
            continue  # another run has ended and removed the folder
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise JournalError(
                    f"another process is writing {str(folder)!r}; wait for it to end, or name "
                    "another table."
                ) from None
            except OSError:
                pass  # a network file system without locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / _ROWS)):
                return file
        file.close()
