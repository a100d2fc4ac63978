"""``squid-fast`` and ``python -m squid_fast``."""

from __future__ import annotations

import sys

from .utils.extras import require
from .utils.threads import limit_spinning


def main() -> None:
    """Run the command line."""
    limit_spinning()  # before anything imports torch
    try:
        require("typer", "screen")
        require("rich", "screen")
        from .cli import app  # needs both, and imports torch
    except (ImportError, OSError) as error:
        sys.exit(f"squid-fast: {error}")
    app()


if __name__ == "__main__":
    main()
