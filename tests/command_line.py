"""The verbs as a user calls them."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

Argument = str | Path | int | float
Done = subprocess.CompletedProcess[str]


def squid(*arguments: Argument, check: bool = True) -> Done:
    """``squid-fast`` in this process, since starting Python and torch anew takes seconds."""
    from squid_fast.__main__ import main

    words = ["squid-fast", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    return _checked(Done(words, code, out.getvalue(), err.getvalue()), check)


def squid_apart(*arguments: Argument, check: bool = True) -> Done:
    """``python -m squid_fast`` in a process of its own."""
    words = [sys.executable, "-m", "squid_fast", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    return _checked(done, check)


def _checked(done: Done, check: bool) -> Done:
    assert not check or done.returncode == 0, done.stderr
    return done
