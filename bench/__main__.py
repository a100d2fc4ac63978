"""Everything that measures, as one tool."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

# Module and summary of every command, or its summary and the commands below it. A module has
# ``add_arguments(parser)``, ``main(options)`` and a docstring that --help shows.
COMMANDS: dict[str, tuple[str | Mapping[str, Any], str]] = {
    "operations": ("operations.micro", "time of every operation beside the reference"),
    "machine-code": ("machine_code.report", "what compilers for three cards make of the kernels"),
    "speed": ("scoring.speed", "scoring and training beside the published way"),
    "stages": ("scoring.stages", "time and ranking of scoring, stage by stage, by precision"),
    "threads": ("scoring.threads", "time of a training step beside busy processes"),
    "decoding": ("scoring.decoding", "image files that one core decodes in a second"),
    "soak": ("scoring.soak", "completeness of a screening run that is killed again and again"),
    "memory": ("scoring.memory", "peak memory of screening, by number of files"),
    "accuracy": (
        {
            "runs": ("accuracy.runs", "every score of trained runs, one by one and together"),
            "baselines": ("accuracy.baselines", "the methods that SQUID is compared with"),
            "contamination": ("accuracy.contamination", "SQUID, trained on abnormal images too"),
            "rounding": ("accuracy.rounding", "what each rounding on a GPU does to the ranking"),
            "demo": ("accuracy.demo", "squid-fast demo, over seeds, alone and beside other work"),
        },
        "what SQUID and other methods reach on labelled images",
    ),
    "costs": ("scoring.costs", "time and price of screening 10⁶, 10⁸ and 10⁹ images"),
    "gpu": ("gpu.stages", "tests and measurements of a machine with a GPU"),
    "pages": ("pages", "the measured figures in the pages of the repository"),
}


def main(arguments: Sequence[str]) -> None:
    """Run the command that the arguments name."""
    parser = ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog="python -m bench COMMAND --help describes a command and its options.",
    )
    _add_commands(parser, COMMANDS, arguments)
    options = parser.parse_args(arguments)
    options.run(options)


def _add_commands(
    parser: ArgumentParser, commands: Mapping[str, Any], arguments: Sequence[str]
) -> None:
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (below, summary) in commands.items():
        command = group.add_parser(name, help=summary, formatter_class=RawDescriptionHelpFormatter)
        if name not in arguments[:1]:
            continue  # need not be imported, and may lack what it needs
        if isinstance(below, str):
            module = import_module(f".{below}", __package__)
            command.description = module.__doc__.replace("``", "")
            module.add_arguments(command)
            command.set_defaults(run=module.main)
        else:
            command.description = f"{summary[0].upper()}{summary[1:]}."
            _add_commands(command, below, arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
