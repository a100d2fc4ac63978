"""What SQUID and other methods reach on labelled images.

Figures go to ``bench/results/accuracy``, those of the demo to ``bench/results``.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from . import baselines, contamination, demo, runs

PROGRAMS = {
    "runs": (runs, "every score of trained runs, one by one and together"),
    "baselines": (baselines, "the methods that SQUID is compared with"),
    "contamination": (contamination, "SQUID trained with abnormal images among the normal"),
    "demo": (demo, "squid-fast demo, over seeds, alone and beside a busy process"),
}


def add_arguments(parser: ArgumentParser) -> None:
    programs = parser.add_subparsers(title="programs", metavar="PROGRAM", required=True)
    for name, (module, summary) in PROGRAMS.items():
        program = programs.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=RawDescriptionHelpFormatter,
        )
        module.add_arguments(program)
