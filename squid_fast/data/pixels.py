"""What the readers of all formats share: the error they raise, limits and scaling."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatImage = npt.NDArray[np.float32]

LUMA = np.array([0.299, 0.587, 0.114])
"""The shares of red, green and blue in the luminance of ITU-R 601."""

MAX_PIXELS = 100_000_000
"""Images with more pixels than this are refused before they are decoded."""


class ImageReadError(ValueError):
    """A file could not be read as an image; the message says which file and why.

    Args:
        message: a sentence. Names in braces stand for ``details``.
        details: what differs between files with the same problem, the file's ``path`` first.

    Attributes:
        kind: the message without the details, which is the same for all files with the problem. Of
            a library's error it has the words up to a number, a quotation or a bracket.

    >>> error = ImageReadError("{path} has {size} bytes", path="scan.png", size=3)
    >>> str(error)
    'scan.png has 3 bytes'
    >>> error.kind
    'the file has … bytes'
    """

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message.format(**details) if details else message)
        alike = {name: _common_part(value) for name, value in details.items()}
        self.kind = message.format(**alike | {"path": "the file"}) if details else message


def _common_part(detail: object) -> str:
    if not isinstance(detail, Exception):
        return "…"
    text = getattr(detail, "strerror", None) or str(detail)
    words = re.split(r"[\d'\"<(\[{]", text, maxsplit=1)[0][:200]
    return words if words == text else f"{words}…"


def check_pixels(width: int, height: int, path: Path) -> None:
    """Raise ImageReadError unless there are pixels, and at most ``MAX_PIXELS``."""
    if width < 1 or height < 1:
        raise ImageReadError(
            "{path} has no pixels ({width}x{height})", path=path, width=width, height=height
        )
    if width * height > MAX_PIXELS:
        raise ImageReadError(
            f"{{path}} has {{width}}x{{height}} = {{count}} pixels; at most {MAX_PIXELS} are read",
            path=path,
            width=width,
            height=height,
            count=width * height,
        )


def stretched(values: npt.NDArray[Any]) -> FloatImage:
    """Scale values so that their minimum is 0 and their maximum 1.

    A constant array becomes 0, and an array with a value that is not finite becomes NaN.
    """
    array = values.astype(np.float64)
    low, high = float(array.min()), float(array.max())
    if not np.isfinite(low) or not np.isfinite(high):
        return np.full(array.shape, np.nan, dtype=np.float32)
    if low == high:
        return np.zeros(array.shape, dtype=np.float32)
    if not np.isfinite(high - low):
        array, low, high = array / 2, low / 2, high / 2
    return ((array - low) / (high - low)).astype(np.float32)
