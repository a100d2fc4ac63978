"""A process that decodes files, seen from both sides.

Among a hundred thousand files there are some that crash a decoder, keep it busy for ever or make it
take all the memory there is. A `Reader` is a process that this may happen to.

It is sent places and paths through its standard input, decodes one file after the other into memory
that it shares with the process that started it, since a pipe would hold but a few images while that
one is busy, and prints a line for each: why there is no image, or nothing. So it is always known
which file it is at. It imports no torch, so that it starts in a moment and is small.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ...data.pixels import ImageReadError
from ...data.readers import load_bytes
from .files import explain_no_file

MAX_FILES = 8
"""That a reader is given at once."""

_MAX_PATH = 4096  # bytes
_MAX_UNREAD = 16384  # bytes; with MAX_FILES long paths more they still fit into a pipe
_MAX_MEMORY = 4 << 30  # bytes of address space
_MAX_TEXT = 10_000  # characters of an error
_START_SECONDS = 60.0  # that a process may take to start
_END_SECONDS = 5.0

# Not `-m` nor the name of a file, which would put the working directory or this folder in front of
# the search path: a file there that is named like a library would be run.
_PROGRAM = """
import sys
sys.path[:] = sys.argv[6:]  # before anything that is found by it is imported
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # what Ctrl-C ends is for the other side to say
from squid_fast.screening.reading.worker import serve
serve(*map(int, sys.argv[1:5]), float(sys.argv[5]))
"""


def load_or_explain(path: str, size: int) -> npt.NDArray[np.uint8] | str:
    """Read an image as uint8 [size, size], 255 = 1.0, or say in a sentence why it cannot be."""
    try:
        return explain_no_file(path) or load_bytes(path, size)
    except ImageReadError as error:
        return _one_line(str(error))
    except Exception as error:  # one bad file must not end the run
        return _one_line(f"{type(error).__name__}: {error}")


def serve(memory: int, places: int, size: int, max_memory: int, timeout: float) -> None:
    """Be a reader: decode what comes through the standard input until it ends.

    Args:
        memory: file descriptor of uint8 [places, size, size].
        places, size: its shape.
        max_memory: bytes of address space that this process may take.
        timeout: seconds after which the other side kills this process for a file. When that side
            is gone, this process ends by itself, after twice as many.
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
    os.dup2(2, 1)  # what libraries print is no answer
    with suppress(BrokenPipeError):
        os.write(answers, b"\n")
        for message in _messages():
            place, _, path = message.partition(b" ")
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout)
            image = load_or_explain(path.decode("utf-8", "surrogatepass"), size)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if isinstance(image, str):
                os.write(answers, image[:_MAX_TEXT].encode("utf-8", "surrogatepass") + b"\n")
            else:
                images[int(place)] = image
                os.write(answers, b"\n")


def _messages() -> Iterator[bytes]:
    rest = b""
    while piece := os.read(0, 1 << 16):
        *whole, rest = (rest + piece).split(b"\0")
        yield from whole


@dataclass(eq=False)
class File:
    """A file that is to be decoded.

    Attributes:
        path: its name.
        place: of its image in the shared memory.
        done: whether it has its image or error.
        error: why it has no image; "" if it has.
        suspect: whether a reader died when it was at this file.
    """

    path: str
    place: int
    done: bool = False
    error: str = ""
    suspect: bool = False

    def __post_init__(self) -> None:
        path = self.path.encode("utf-8", "surrogatepass")
        self.message = b"%d %s\0" % (self.place, path)
        if b"\0" in path or len(path) > _MAX_PATH:  # no file has such a name
            self.finish(str(load_or_explain(self.path, 1)))

    def finish(self, error: str = "") -> None:
        """Note that there is an image, or why there is none."""
        self.done, self.error = True, error


class Reader:
    """A process that decodes files into shared memory, uint8 [places, size, size].

    Attributes:
        files: those it was given and has not yet answered, in order.
        answers: can be read when there is an answer, or when the process has died.
        started: whether it has come as far as to be at the first of them.
        waited: seconds that were spent waiting for the next answer; whoever waits counts them.

    Raises:
        RuntimeError: the process cannot be started.
    """

    def __init__(self, memory: int, places: int, size: int, timeout: float) -> None:
        self.files: deque[File] = deque()
        self.started = False
        self.waited = 0.0
        self._timeout = timeout
        self._unread = 0
        self._rest = b""
        options = ["-W", "ignore", "-X", f"utf8={sys.flags.utf8_mode}", "-c", _PROGRAM]
        arguments = map(str, (memory, places, size, _MAX_MEMORY, timeout))
        folders = (folder or os.curdir for folder in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, *options, *arguments, *folders],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Threads of numpy would spend address space, and have nothing to do.
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=(memory,),
            )
        except OSError as error:
            raise RuntimeError(
                f"no process for decoding images can be started ({error}); try fewer workers, or "
                "0 to decode in this process"
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self.answers = self._process.stdin, self._process.stdout

    @property
    def patience(self) -> float:
        """Seconds for which the next answer is still worth waiting."""
        return (self._timeout if self.started else max(self._timeout, _START_SECONDS)) - self.waited

    @property
    def has_room(self) -> bool:
        """Whether it can be given `MAX_FILES` more; a suspect is not joined by others."""
        return self._unread < _MAX_UNREAD and not (self.files and self.files[0].suspect)

    def give(self, files: list[File]) -> None:
        """Have files decoded after those that were given before."""
        if not self.files:
            self.waited = 0.0
        self.files.extend(files)
        message = b"".join(file.message for file in files)
        self._unread += len(message)
        with suppress(BrokenPipeError):  # it has died; that is noticed where it should answer
            self._input.write(message)

    def answer(self) -> bool:
        """Take the answers that are there; False if the process has died."""
        if not (piece := os.read(self.answers.fileno(), 1 << 16)):
            return False
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if lines and not self.started:
            self.started = True
            del lines[0]
        for line in lines:
            file = self.files.popleft()
            file.finish(line.decode("utf-8", "surrogatepass"))
            self._unread -= len(file.message)
        self.waited = 0.0
        return True

    def kill(self) -> None:
        """Have the process end; `end` waits for it."""
        self._process.kill()

    def end(self) -> str:
        """Wait for the end of a process that is ending, and say what ended it."""
        self._input.close()
        self.answers.close()
        for _ in range(2):
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(_END_SECONDS)
                return f"{signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
            self.kill()
        return "it hangs in the system"


def shared_memory(length: int) -> BinaryIO:
    """A file of that many bytes without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        file: BinaryIO = os.fdopen(os.memfd_create("squid-fast"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    file.truncate(length)
    return file


def map_images(file: BinaryIO, places: int, size: int) -> npt.NDArray[np.uint8]:
    """The memory that a file stands for, as uint8 [places, size, size]."""
    return np.asarray(np.memmap(file, np.uint8, "r+", shape=(places, size, size)))


def _one_line(text: str) -> str:
    return " ".join(text.split())
