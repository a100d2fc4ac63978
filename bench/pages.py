"""The measured figures in the pages of the repository, and the version in ``CITATION.cff``.

Each table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->`` and is made from a file
under ``bench/results``. The version is that of ``squid_fast/_version.py``.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, Namespace

from squid_fast import __version__

from .accuracy.tables import TABLES as ACCURACY
from .machine_code.tables import TABLES as MACHINE_CODE
from .measurements import RESULTS, ROOT
from .operations.tables import TABLES as OPERATIONS
from .scoring.tables import TABLES as SCORING

_READMES = [folder / "README.md" for folder in (ROOT, RESULTS, ROOT / "kernels")]
PAGES = (*_READMES, RESULTS / "scale.md", ROOT / "CITATION.cff")
TABLES = {**SCORING, **OPERATIONS, **MACHINE_CODE, **ACCURACY}
_FIGURES = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_VERSION = re.compile(r"^version: .*$", re.MULTILINE)


def fill(text: str) -> str:
    """The text with every marked table, and the version of a citation, made anew."""
    text = _FIGURES.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)
    return _VERSION.sub(f"version: {__version__}", text)


def add_arguments(parser: ArgumentParser) -> None:
    help = "A check that the pages are up to date, in place of writing them; exits with 1 if not."
    parser.add_argument("--check", action="store_true", help=help)


def main(options: Namespace) -> None:
    """Rewrite the pages, or check them."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            stale.append(str(page.relative_to(ROOT)))
            if not options.check:
                page.write_text(filled, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"{', '.join(stale)}: figures are out of date; run python -m bench pages.")
