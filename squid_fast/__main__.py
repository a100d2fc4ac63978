"""``squid-fast`` and ``python -m squid_fast``."""

from __future__ import annotations

import sys
import warnings

from .utils.program import close_output, end_on_interrupt, ignore_interrupts, open_streams


def main() -> None:
    """Run the command line."""
    end_on_interrupt()
    open_streams()
    if not sys.warnoptions:  # what a reader of images repairs is no news; what it refuses is told
        warnings.filterwarnings("ignore", module=r"(PIL|pydicom|tifffile)\b")
    from .utils.extras import require
    from .utils.threads import limit_spinning

    limit_spinning()  # before anything imports torch
    try:
        require("typer", "screen")
        require("rich", "screen")
        from .cli import app  # needs both, and imports torch
    except (ImportError, OSError) as error:
        sys.exit(f"squid-fast: {error}")
    code = 1
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except OSError as error:  # help that cannot be printed
        print(f"squid-fast: {error.strerror or error}", file=sys.stderr)
    code = close_output(code)
    ignore_interrupts()
    sys.exit(code)


if __name__ == "__main__":
    main()
