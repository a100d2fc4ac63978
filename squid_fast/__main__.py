"""``squid-fast`` and ``python -m squid_fast``."""

from __future__ import annotations

import sys

from .utils.extras import require
from .utils.threads import limit_spinning


def main() -> None:
    """Run the command line; errors that a user can mend end in one sentence and exit code 1."""
    limit_spinning()  # before anything imports torch
    try:
        require("typer", "screen")
        require("rich", "screen")
        from .cli import app

        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"squid-fast: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
