"""Values as UTF-8 and JSON can hold them."""

from __future__ import annotations

import math


def utf8_text(text: str) -> str:
    r"""``text`` with what UTF-8 cannot hold spelled out, such as a file name's byte as ``\xff``."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def finite_or_none(value: float | None) -> float | None:
    """``value``, or None for NaN and infinity, which JSON does not know."""
    return value if value is not None and math.isfinite(value) else None
