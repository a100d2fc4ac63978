"""This process as a program: its standard streams, and what Ctrl-C does to it."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

INTERRUPTED = 130  # exit code of what SIGINT has ended, as shells have it


def open_streams() -> None:
    """Make standard streams that can be written to, whatever the caller has closed.

    A number below 3 that is free would go to the next file that is opened, and what libraries
    print would go into that file. ``sys.stdin`` stays None, so that reading it can be refused.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)  # reader processes need it, too
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (kept open)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (kept open)
    # File names may hold what the encoding of the terminal does not.
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, _Remarks(sys.stderr))


def close_output(code: int) -> int:
    """Flush standard output; returns the exit code, which a failure of that makes 1.

    Python would say so in a traceback, and lose the exit code.
    """
    try:
        sys.stdout.flush()
        return code
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):  # it is flushed once more at exit
            os.dup2(nowhere, sys.stdout.fileno())
        if not code and error.errno != errno.EPIPE:  # or else head has read enough
            print(f"squid-fast: standard output: {error.strerror}", file=sys.stderr)
        return code or 1


class _Remarks:
    """Standard error, without an exception if it fails.

    Work goes on when the terminal is closed, the disk of a log full, or ``head`` has read enough.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def end_on_interrupt() -> None:
    """Let Ctrl-C end the program at once, while nothing can be lost.

    The exception that Python raises otherwise comes out of half-loaded libraries in many forms.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, _end)


def ignore_interrupts() -> None:
    """Let Ctrl-C change nothing any more, for the work is done and the exit code known.

    Python takes a moment to end, and another exit code if it is interrupted meanwhile.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C raise KeyboardInterrupt in the block, and a second one end the program at once.

    Gives a function that says whether there was one: libraries turn the exception into others.
    """
    asked = False

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal asked
        if asked:
            _end(number, frame)
        asked = True
        raise KeyboardInterrupt

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        nonlocal asked
        if not issubclass(found.exc_type, KeyboardInterrupt):
            shown(found)
            return
        asked = False  # it was lost in a destructor, where it would be once more
        again = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
        again.daemon = True
        again.start()

    before, shown = signal.getsignal(signal.SIGINT), sys.unraisablehook
    ours = before in (signal.default_int_handler, _end)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = unraisable
    try:
        yield lambda: asked
    finally:
        sys.unraisablehook = shown
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"squid-fast: interrupted\n")
    os._exit(INTERRUPTED)
