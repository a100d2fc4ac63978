"""Text and numbers in the form in which files, tables and JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator


def utf8_text(text: str) -> str:
    r"""Spell out what UTF-8 or a table cannot hold, such as a file name's byte as ``\xff``, or NUL.

    >>> import os
    >>> print(utf8_text(os.fsdecode(b"caf\xe9.png")))
    caf\xe9.png
    """
    text = text.replace("\0", r"\x00")
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """``text`` with a single space in place of every line break and run of white space."""
    return " ".join(text.split())


def column_names(rows: Iterator[list[str]]) -> list[str]:
    """Take the header of a CSV table off ``rows``: names without spaces around, in lower case."""
    return [name.strip().lower() for name in next(rows, [])]


def finite_or_none(value: float | None) -> float | None:
    """``value``, or None for NaN and infinity, which JSON does not know."""
    return value if value is not None and math.isfinite(value) else None
