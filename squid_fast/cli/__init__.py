"""The command line: one thin function for each verb."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .._version import __version__
from . import ablation, models, scoring, training
from .options import current_name


class _Verbs(TyperGroup):
    """The verbs: former names of options work, and errors that a user can mend are one sentence."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, [current_name(word) for word in rest]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise  # typer ends the program without a message
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            print(f"squid-fast: {error}", file=sys.stderr)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Verbs,
    rich_markup_mode=None,  # its table of options breaks long names and choices apart
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="SQUID finds what is unusual in radiographs, having learned from normal ones alone. "
    "Research software, not a medical device.",
)


def _version(shown: bool) -> None:
    if shown:
        print(f"squid-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Version of squid-fast."),
    ] = False,
) -> None:
    pass


for verb in (
    models.demo, training.train, models.evaluate, scoring.screen, scoring.pack, scoring.bench,
    scoring.export, models.convert, models.synth, ablation.ablate, training.diagnose,
):  # fmt: skip
    app.command()(verb)

__all__ = ["app"]
