"""Tables of the pages, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import measurements


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    text: int | Sequence[int] = 1,
    note: str = "",
) -> str:
    """A table, and a note below it.

    ``text`` are the columns of words, aligned to the left: the number of first ones, or indices.
    """
    words = range(text) if isinstance(text, int) else text
    rule = "|".join("---" if index in words else "--:" for index in range(len(head)))
    lines = [f"| {' | '.join(head)} |", f"|{rule}|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines + (["", note] if note else []))


def of_file(name: str, make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """The table that ``make`` makes of a file of figures, or that there is no such file."""

    def text() -> str:
        figures = measurements.read(measurements.RESULTS / name)
        return (
            make(figures) if figures else f"Not measured yet: there is no `bench/results/{name}`."
        )

    return text
