"""Everything that measures, as one tool."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

# Module and summary of every command. A module has ``add_arguments``, which describes its options
# and names the function that runs it.
COMMANDS = {
    "operations": ("operations.micro", "time of every operation beside the reference"),
    "machine-code": ("machine_code.report", "what compilers for three cards make of the kernels"),
    "speed": ("scoring.speed", "scoring and training beside the published way"),
    "stages": ("scoring.stages", "time and ranking of scoring, stage by stage, by precision"),
    "threads": ("scoring.threads", "time of a training step beside busy processes"),
    "decoding": ("scoring.decoding", "image files that one core decodes in a second"),
    "soak": ("scoring.soak", "completeness of a screening run that is killed again and again"),
    "memory": ("scoring.memory", "peak memory of screening, by number of files"),
    "accuracy": ("accuracy.programs", "what SQUID and other methods reach on labelled images"),
    "costs": ("scoring.costs", "time and price of screening 10⁶, 10⁸ and 10⁹ images"),
    "gpu": ("gpu.stages", "tests and measurements of a machine with a GPU"),
    "pages": ("pages", "the measured figures in the pages of the repository"),
}


def main(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names."""
    parser = ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog="python -m bench COMMAND --help describes a command and its options.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=RawDescriptionHelpFormatter
        )
        if name in arguments[:1]:  # others need not be imported, and may lack what they need
            found = import_module(f".{module}", __package__)
            command.description = found.__doc__
            found.add_arguments(command)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
