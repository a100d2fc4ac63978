"""The command line: one thin function for each verb."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from . import ablation, models, scoring, training

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="SQUID: find what is unusual in radiographs, from normal ones alone. Research software, "
    "not a medical device.",
)


def _version(shown: bool) -> None:
    if shown:
        print(f"squid-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for verb in (
    models.demo,
    training.train,
    models.evaluate,
    scoring.screen,
    scoring.pack,
    scoring.bench,
    scoring.export,
    models.convert,
    models.synth,
    ablation.ablate,
    training.diagnose,
):
    app.command()(verb)

__all__ = ["app"]
