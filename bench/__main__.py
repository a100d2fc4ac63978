"""Everything that measures, as one tool: ``python -m bench COMMAND``."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "operations": "operations.micro",
    "roofline": "operations.roofline",
    "machine-code": "machine_code.compile_report",
    "speed": "scoring.speed",
    "stages": "scoring.stages",
    "decoding": "scoring.decoding",
    "soak": "scoring.soak",
    "memory": "scoring.memory",
    "threads": "scoring.threads",
    "demo": "scoring.demo",
    "costs": "scoring.costs",
    "accuracy": "accuracy.accuracy",
    "pages": "pages",
}


def main() -> None:
    """Run the command that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m bench {{{','.join(COMMANDS)}}} ...")
    command = sys.argv.pop(1)
    sys.argv[0] = f"python -m bench {command}"
    runpy.run_module(f"bench.{COMMANDS[command]}", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
