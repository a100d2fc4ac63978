"""Tables of the pages, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    text: int | Sequence[int] = 1,
    note: str = "",
) -> str:
    """A table, and a note below it.

    Args:
        text: The columns that hold words, which are aligned to the left: their number where they
            are the first ones, else their indices. The others hold figures.
    """
    words = range(text) if isinstance(text, int) else text
    rule = "|".join("---" if index in words else "--:" for index in range(len(head)))
    lines = [f"| {' | '.join(head)} |", f"|{rule}|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines + (["", note] if note else []))


def not_measured(name: str) -> str:
    """What stands in place of a table without figures."""
    return f"Not measured yet: there is no `bench/results/{name}`."
