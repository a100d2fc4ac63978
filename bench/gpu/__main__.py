"""The programs of ``python -m bench gpu``, one by one."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from importlib import import_module

from ..arguments import add_device, add_option, add_output
from ..measurements import ROOT
from .trials import Trials

PROGRAMS = ("contact", "levers", "biases", "steps", "peers")


def main() -> None:
    """Run a program; exit with 1 if one of its trials failed."""
    parser = ArgumentParser(prog="python -m bench.gpu", description=__doc__.replace("``", ""))
    parser.add_argument("program", choices=PROGRAMS, help="Program, a module of this folder.")
    add_option(parser, "--seconds", 60.0, "Time after which no trial is begun")
    add_device(parser)
    add_output(parser, ROOT / ".benchmarks")
    options = parser.parse_args()
    run = Trials(options.program, options)
    import_module(f".{options.program}", __package__).make(run)
    sys.exit(bool(run.failures))


if __name__ == "__main__":
    main()
