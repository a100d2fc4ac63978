"""What the readers of all formats share: the error they raise, limits, scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatImage = npt.NDArray[np.float32]

MAX_PIXELS = 100_000_000
"""Images with more pixels than this are refused before they are decoded."""


class ImageReadError(ValueError):
    """A file could not be read as an image; the message says which file and why."""


def check_pixels(width: int, height: int, path: Path) -> None:
    """Refuse images without pixels and those with more than `MAX_PIXELS`."""
    if width < 1 or height < 1:
        raise ImageReadError(f"{path} has no pixels ({width}x{height})")
    if width * height > MAX_PIXELS:
        raise ImageReadError(
            f"{path} has {width}x{height} = {width * height} pixels; at most {MAX_PIXELS} are read"
        )


def stretched(values: npt.NDArray[Any]) -> FloatImage:
    """Minimum to 0, maximum to 1; a constant array to 0; NaN where a value is not finite."""
    array = values.astype(np.float64)
    low, high = float(array.min()), float(array.max())
    if not np.isfinite(low) or not np.isfinite(high):
        return np.full(array.shape, np.nan, dtype=np.float32)
    if low == high:
        return np.zeros(array.shape, dtype=np.float32)
    if not np.isfinite(high - low):
        array, low, high = array / 2, low / 2, high / 2
    return ((array - low) / (high - low)).astype(np.float32)
