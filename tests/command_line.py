"""The verbs as a user calls them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

Argument = str | Path | int | float
Done = subprocess.CompletedProcess[str]


def squid(*arguments: Argument, check: bool = True) -> Done:
    """``squid-fast`` in this process, since starting Python and torch anew takes seconds."""
    from typer.testing import CliRunner  # of an extra, without which tests are skipped

    from squid_fast.cli import app

    words = [str(word) for word in arguments]
    result = CliRunner().invoke(app, words, catch_exceptions=False, prog_name="squid-fast")
    done = Done(["squid-fast", *words], result.exit_code, result.stdout, result.stderr)
    return _checked(done, check)


def squid_apart(*arguments: Argument, check: bool = True) -> Done:
    """``python -m squid_fast`` in a process of its own."""
    words = [sys.executable, "-m", "squid_fast", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    return _checked(done, check)


def _checked(done: Done, check: bool) -> Done:
    assert not check or done.returncode == 0, done.stderr
    return done
