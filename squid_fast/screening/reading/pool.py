"""A pool of reader processes that decode files ahead of their use.

A process that dies or hangs is replaced, and only the file that it was decoding gets an error. The
pools of the standard library lose all pending work when a process dies, cannot end one that hangs,
and import the caller's ``__main__`` again in each, which breaks scripts without a guard.

Reader processes need POSIX. Elsewhere, and with ``workers=0``, files are decoded in this process,
which then is not protected from a file that crashes or hangs its decoder.
"""

from __future__ import annotations

import math
import os
import selectors
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterable
from typing import BinaryIO

from ...data.pixels import ImageReadError
from .worker import MAX_FILES, Decoded, File, Reader, decode, map_images

TIMEOUT = 60.0
"""Seconds that decoding one file may take by default."""

_MAX_TIMEOUT = 1e6
_MAX_WORKERS = 1024
_MAX_FAILED_STARTS = 3  # in a row
_TICK = 1.0


def read_ahead(
    paths: Iterable[str],
    size: int,
    workers: int | None = None,
    look_ahead: int | None = None,
    timeout: float = TIMEOUT,
) -> Generator[Decoded, None, None]:
    """Yield the image or error of each file, in order, while the next files are being decoded.

    Closing the iterator ends the processes.

    Args:
        paths: files, which are taken from the iterable as reading goes on.
        size: side of the images in pixels.
        workers: number of processes, see ``screen``.
        look_ahead: largest number of images held in memory, decoded or being decoded.
        timeout: seconds after which a file is given up.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the processes cannot be started.
    """
    workers = check_reading(workers, timeout)
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    if look_ahead is None:
        look_ahead = max(64, 8 * workers)
    if look_ahead < 1:
        raise ValueError(f"look_ahead must be at least 1, not {look_ahead}")
    if workers == 0:
        return (decode(path, size) for path in paths)
    return _read_in_processes(paths, size, workers, look_ahead, timeout)


def check_reading(workers: int | None, timeout: float) -> int:
    """Check arguments of ``read_ahead``; returns the number of processes."""
    if not 0 < timeout <= _MAX_TIMEOUT:
        raise ValueError(f"timeout must be more than 0 and at most 1e6 seconds, not {timeout}")
    posix = os.name == "posix"
    if workers is None:
        return min(16, _available_cores()) if posix else 0
    if workers < 0:
        raise ValueError(f"workers must be at least 0, not {workers}")
    if workers > _MAX_WORKERS:
        raise ValueError(f"workers must be at most {_MAX_WORKERS}, not {workers}")
    if workers and not posix:
        raise ValueError(f"workers must be 0 on this system, which is no POSIX, not {workers}")
    return workers


def _read_in_processes(
    paths: Iterable[str], size: int, workers: int, look_ahead: int, timeout: float
) -> Generator[Decoded, None, None]:
    with _Pool(size, workers, look_ahead, timeout) as pool:
        for path in paths:
            if pool.is_full:
                yield pool.take()
            pool.add(path)
        while not pool.is_empty:
            yield pool.take()


class _Pool:
    """Readers, and the files that were added and not yet taken.

    Until it is taken, a file keeps its place in the shared memory.
    """

    def __init__(self, size: int, workers: int, look_ahead: int, timeout: float) -> None:
        self._workers = workers
        self._at_once = max(1, min(MAX_FILES, look_ahead // (4 * workers)))
        self._memory = _shared_memory(look_ahead * size * size)
        self._images = map_images(self._memory, look_ahead, size)
        self._reader_arguments = (self._memory.fileno(), look_ahead, size, timeout)
        self._free_places = list(range(look_ahead))
        self._under_way = deque[File]()
        self._waiting = deque[File]()
        self._readers: list[Reader] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.kill()
        for reader in self._readers:
            reader.end()
        self._selector.close()
        self._memory.close()
        del self._images

    @property
    def is_full(self) -> bool:
        return not self._free_places

    @property
    def is_empty(self) -> bool:
        return not self._under_way

    def add(self, path: str) -> None:
        file = File(path, self._free_places.pop())
        self._under_way.append(file)
        if not file.done:
            self._waiting.append(file)
        if len(self._waiting) >= self._at_once:
            self._receive(0)
            self._hand_out()

    def take(self) -> Decoded:
        """Wait for the first of the files, and take it out."""
        file = self._under_way[0]
        while not file.done:
            self._hand_out()
            self._wait()
        self._under_way.popleft()
        self._free_places.append(file.place)
        return file.failed or Decoded(file.path, self._images[file.place].copy())

    def _hand_out(self) -> None:
        """Give the files that wait to the readers with the fewest files."""
        unfinished = len(self._waiting) + sum(len(reader.files) for reader in self._readers)
        while len(self._readers) < min(self._workers, unfinished):
            self._start()
        while self._waiting:
            able = [reader for reader in self._readers if reader.has_room]
            if not able:
                return
            reader = min(able, key=lambda reader: len(reader.files))
            count = self._at_once
            if len(self._waiting) < count:
                if len(reader.files) >= count:
                    return  # the readers have enough to do until more files wait
                count = math.ceil(len(self._waiting) / self._workers)
            reader.give([self._waiting.popleft() for _ in range(count)])

    def _start(self) -> Reader:
        reader = Reader(*self._reader_arguments)
        self._readers.append(reader)
        self._selector.register(reader.answers, selectors.EVENT_READ, reader)
        return reader

    def _wait(self) -> None:
        """Wait for an answer, and kill readers that have taken too long.

        Only time spent here counts, not time in which this process was busy or was stopped.
        """
        busy = [reader for reader in self._readers if reader.files]
        seconds = max(0.0, min([_TICK, *(reader.patience for reader in busy)]))
        start = time.monotonic()
        answered = self._receive(seconds)
        waited = min(time.monotonic() - start, seconds)
        for reader in busy:
            if reader in answered:
                continue
            reader.waited += waited
            if reader.patience <= 0:
                reader.kill()
                self._lose(reader, hangs=True)

    def _receive(self, seconds: float) -> list[Reader]:
        """Wait for answers and take them; returns the readers that gave any."""
        ready: list[Reader] = [key.data for key, _ in self._selector.select(seconds)]
        for reader in ready:
            if reader.answer():
                self._failed_starts = 0
            else:
                self._lose(reader)
        return ready

    def _lose(self, reader: Reader, hangs: bool = False) -> None:
        """Remove a reader that has died or hangs; its files go to others."""
        self._readers.remove(reader)
        self._selector.unregister(reader.answers)
        reason = reader.end()
        if not reader.started:
            self._failed_starts += 1
            if self._failed_starts == _MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"the processes that decode images end before they begin ({reason}); what they "
                    "printed above says why. workers=0 decodes without them"
                )
        elif reader.files:
            self._blame(reader.files.popleft(), reason, hangs)
        self._waiting.extendleft(reversed(reader.files))

    def _blame(self, file: File, reason: str, hangs: bool) -> None:
        """Give up the file that a lost reader was decoding, or try it once more."""
        if hangs:
            *_, timeout = self._reader_arguments
            problem = f"{{path}} was not decoded within {timeout:g} s"
        elif file.suspect:
            problem = f"{{path}} kills the process that decodes it, twice now ({reason})"
        else:
            # Memory may have run out for another file: alone in a process, it shows the cause.
            file.suspect = True
            self._start().give([file])
            return
        file.finish(Decoded.failed(file.path, ImageReadError(problem, path=file.path)))


def _shared_memory(length: int) -> BinaryIO:
    """Open a file of ``length`` bytes without a name, in memory if the system can do that."""
    if hasattr(os, "memfd_create"):
        file: BinaryIO = os.fdopen(os.memfd_create("squid-fast"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    file.truncate(length)
    return file


def _available_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
