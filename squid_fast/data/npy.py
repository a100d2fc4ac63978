"""Images in NumPy's NPY files."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from .pixels import FloatImage, ImageReadError, check_pixels, stretched


def read_npy(file: BinaryIO, path: Path) -> FloatImage:
    """Read the array as an image, [H, W] in [0, 1]; see ``read_image``."""
    form = np.lib.format
    headers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    version = form.read_magic(file)
    if version not in headers:
        raise ImageReadError(
            "{path} is in version {version} of NPY; 1 and 2 are read", path=path, version=version[0]
        )
    shape, _, dtype = headers[version](file)
    if dtype.kind not in "buif":
        raise ImageReadError(
            "{path} holds values of type {dtype}; bool, integers and floats are read",
            path=path,
            dtype=dtype,
        )
    sides = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    sides = sides[:2] if len(sides) == 3 and sides[2] == 1 else sides
    if len(sides) != 2:
        raise ImageReadError(
            "{path} has the shape {shape}; [H, W], [1, H, W] and [H, W, 1] are read",
            path=path,
            shape=list(shape),
        )
    check_pixels(sides[1], sides[0], path)
    file.seek(0)
    # Read, not mapped: a mapped file that becomes shorter kills the process.
    array = form.read_array(file, allow_pickle=False).reshape(sides)
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        top = 255 if array.dtype.itemsize == 1 else 65535
        return np.asarray(array.astype(np.float32) / top, dtype=np.float32)
    if array.min() >= 0 and array.max() <= 1:
        return np.asarray(array, dtype=np.float32)
    return stretched(array)
