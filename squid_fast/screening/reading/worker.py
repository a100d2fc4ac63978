"""Reader processes: both ends of a process that decodes files.

Some files crash a decoder, keep it busy for ever or make it take all the memory there is. A
``Reader`` is a process to which this may happen.

It receives places and paths through its standard input, and decodes one file after the other into
shared memory: a pipe would hold only a few images while the parent is busy. For each file it prints
one line, empty if there is an image, and else the error and its kind, so that it is always known
which file it is working on. It does not import torch, so that it starts quickly and stays small.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ...data.pixels import ImageReadError
from ...data.readers import load_bytes
from ...utils.text import one_line
from .files import check_is_file

MAX_FILES = 8
"""Number of files that a reader is given at once."""

_MAX_PATH = 4096  # bytes
_MAX_UNREAD = 16384  # bytes; together with MAX_FILES long paths, this still fits into a pipe
_MAX_MEMORY = 4 << 30  # bytes of address space
_MAX_TEXT = 10_000  # characters of an error
_START_SECONDS = 60.0  # time that a process may take to start
_END_SECONDS = 5.0

# Neither ``-m`` nor the name of a file: they put the working directory or this folder first on the
# search path, and a file there that is named like a library would be run.
_PROGRAM = """
import sys
sys.path[:] = sys.argv[6:]  # before the first import that needs it
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C ends
from squid_fast.screening.reading.worker import serve
serve(*map(int, sys.argv[1:5]), float(sys.argv[5]))
"""


class Decoded(NamedTuple):
    """One file that was read: its image, or why there is none.

    Attributes:
        image: uint8 [S, S] with 255 = 1.0, or None.
        error: why there is no image, in one sentence, or None.
        error_kind: see ``ImageReadError.kind``; None where it is not known.
    """

    path: str
    image: npt.NDArray[np.uint8] | None
    error: str | None = None
    error_kind: str | None = None

    @classmethod
    def failed(cls, path: str, error: Exception) -> Decoded:
        if isinstance(error, ImageReadError):
            text, kind = str(error), error.kind
        else:
            name = type(error).__name__
            text, kind = f"{name}: {error}", f"{name}: …"
        return cls(path, None, one_line(text), one_line(kind))


def decode(path: str, size: int) -> Decoded:
    """Read an image as uint8 [size, size], or say why it cannot be read."""
    try:
        check_is_file(path)
        return Decoded(path, load_bytes(path, size))
    except Exception as error:  # one bad file must not end the run
        return Decoded.failed(path, error)


def serve(memory: int, places: int, size: int, max_memory: int, timeout: float) -> None:
    """Run as a reader: decode the files named on the standard input until it ends.

    Args:
        memory: file descriptor of the shared memory, uint8 [places, size, size].
        max_memory: bytes of address space that this process may take.
        timeout: seconds after which the parent kills this process if a file is not decoded. Without
            a parent, it ends itself after twice that time.
    """
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = max_memory if most == resource.RLIM_INFINITY else min(max_memory, most)
    with suppress(OSError, ValueError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with open(memory, "r+b") as file:
        images = map_images(file, places, size)
    answers = os.dup(1)
    with open(os.devnull, "wb") as nowhere:  # what libraries print, such as libtiff, is no answer
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    with suppress(BrokenPipeError):
        os.write(answers, b"\n")
        for message in _messages():
            place, _, path = message.partition(b" ")
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout)
            item = decode(path.decode("utf-8", "surrogatepass"), size)
            signal.setitimer(signal.ITIMER_REAL, 0)
            answer = ""
            if item.image is not None:
                images[int(place)] = item.image
            elif item.error is not None:  # one line, which holds no tab
                answer = f"{item.error[:_MAX_TEXT]}\t{item.error_kind}"
            os.write(answers, answer.encode("utf-8", "surrogatepass") + b"\n")


def _messages() -> Iterator[bytes]:
    rest = b""
    while piece := os.read(0, 1 << 16):
        *whole, rest = (rest + piece).split(b"\0")
        yield from whole


@dataclass(eq=False)
class File:
    """A file that is to be decoded."""

    path: str
    place: int  # index of its image in the shared memory
    done: bool = False
    failed: Decoded | None = None  # the result if there is no image
    suspect: bool = False  # whether a reader has died while it was decoding this file

    def __post_init__(self) -> None:
        path = self.path.encode("utf-8", "surrogatepass")
        self.message = b"%d %s\0" % (self.place, path)
        if b"\0" in path or len(path) > _MAX_PATH:  # no file has such a name
            self.finish(decode(self.path, 1))

    def finish(self, failed: Decoded | None = None) -> None:
        self.done, self.failed = True, failed


class Reader:
    """A process that decodes files into shared memory, uint8 [places, size, size].

    Attributes:
        files: the files it was given and has not answered yet, in order.
        answers: a pipe that can be read when there is an answer or the process has died.
        waited: seconds spent waiting for the next answer, counted by whoever waits.

    Raises:
        RuntimeError: the process cannot be started.
    """

    def __init__(self, memory: int, places: int, size: int, timeout: float) -> None:
        self.files = deque[File]()
        self.started = False
        self.waited = 0.0
        self._timeout = timeout
        self._unread = 0
        self._rest = b""
        options = ["-W", "ignore", "-X", f"utf8={sys.flags.utf8_mode}", "-c", _PROGRAM]
        arguments = map(str, (memory, places, size, _MAX_MEMORY, timeout))
        folders = (folder or os.curdir for folder in sys.path)
        # The process inherits the mask, so that Ctrl-C does not end it before _PROGRAM ignores it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self._process = subprocess.Popen(
                [sys.executable, *options, *arguments, *folders],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Threads of numpy would take address space and have nothing to do.
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=(memory,),
            )
        except OSError as error:
            raise RuntimeError(
                f"no process for decoding images can be started ({error}); try fewer workers, or "
                "0 to decode in this process"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self.answers = self._process.stdin, self._process.stdout

    @property
    def patience(self) -> float:
        """Seconds that are left to wait for the next answer."""
        return (self._timeout if self.started else max(self._timeout, _START_SECONDS)) - self.waited

    @property
    def has_room(self) -> bool:
        """Whether it can take ``MAX_FILES`` more; a suspect file has a reader to itself."""
        return self._unread < _MAX_UNREAD and not (self.files and self.files[0].suspect)

    def give(self, files: list[File]) -> None:
        """Send files to be decoded, after those that were given before."""
        if not self.files:
            self.waited = 0.0
        self.files.extend(files)
        message = b"".join(file.message for file in files)
        self._unread += len(message)
        with suppress(BrokenPipeError):  # it has died, which is noticed when it does not answer
            self._input.write(message)

    def answer(self) -> bool:
        """Take the answers that have come; False if the process has died."""
        if not (piece := os.read(self.answers.fileno(), 1 << 16)):
            return False
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if lines and not self.started:
            self.started = True
            del lines[0]
        for line in lines:
            file = self.files.popleft()
            error, _, kind = line.decode("utf-8", "surrogatepass").partition("\t")
            file.finish(Decoded(file.path, None, error, kind) if error else None)
            self._unread -= len(file.message)
        self.waited = 0.0
        return True

    def kill(self) -> None:
        """Kill the process; ``end`` waits until it has ended."""
        self._process.kill()

    def end(self) -> str:
        """Wait until the process has ended, and say what ended it."""
        self._input.close()
        self.answers.close()
        for _ in range(2):
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(_END_SECONDS)
                return f"{signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
            self.kill()
        return "it hangs in the system"


def map_images(file: BinaryIO, places: int, size: int) -> npt.NDArray[np.uint8]:
    """Map a file into memory as uint8 [places, size, size]."""
    return np.asarray(np.memmap(file, np.uint8, "r+", shape=(places, size, size)))
