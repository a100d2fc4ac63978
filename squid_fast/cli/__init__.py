"""The command line: one thin function for each verb."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .._version import __version__
from ..utils.program import INTERRUPTED, interruptible
from . import ablation, models, scoring, training
from .options import current_name

_MENDABLE = (ValueError, OSError, ImportError, RuntimeError, MemoryError)


def _sentence(error: BaseException) -> str:
    """What went wrong, in the words of the error; those of the system without its numbers."""
    if isinstance(error, OSError) and error.strerror:
        file = "" if error.filename is None else f"{error.filename!r}: "
        return f"{file}{error.strerror}"
    return str(error) or "there is too little memory"


class _Verbs(TyperGroup):
    """The verbs: former names of options work, and errors that a user can mend are one sentence."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, [current_name(word) for word in rest]

    def invoke(self, ctx: Any) -> Any:
        with interruptible() as interrupted:
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, BrokenPipeError):
                raise  # typer ends the program without a message
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt) or interrupted():
                    print("squid-fast: interrupted", file=sys.stderr)
                    raise typer.Exit(INTERRUPTED) from error
                if not isinstance(error, _MENDABLE):
                    raise
                print(f"squid-fast: {_sentence(error)}", file=sys.stderr)
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
