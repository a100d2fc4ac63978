"""TIFF, where Pillow reads it otherwise than documented here, or not at all."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..utils.extras import require
from .pixels import FloatImage, ImageReadError, check_pixels, stretched

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _STRIP_BYTES, _SAMPLE_FORMAT = 273, 274, 277, 279, 339
_WHITE_IS_ZERO, _BLACK_IS_ZERO = 0, 1
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_CODES = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}
_NAMES = {_UNSIGNED: "unsigned", _SIGNED: "signed", _FLOAT: "floating-point"}

Tags = Mapping[int, Any]


def load_as_stored(image: Any) -> tuple[Any, Tags]:
    """Decode an opened TIFF and undo the turn that Pillow gives it; the image and its tags."""
    orientation = image.getexif().get(_ORIENTATION)
    image.load()
    turns = require("PIL.Image", "screen").Transpose
    undo = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }.get(orientation)
    return (image if undo is None else image.transpose(undo)), image.tag_v2


def wide_samples(image: Any, tags: Tags) -> FloatImage | None:
    """A decoded TIFF as greyscale, [H, W] in [0, 1]; None if its samples are unsigned bytes."""
    bits, form = tags.get(_BITS, (1,))[0], tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0]
    values: npt.NDArray[Any] = np.asarray(image)
    if image.mode == "L" and form == _SIGNED:
        values = values.view(np.int8)
    elif image.mode == "I" and form == _UNSIGNED:
        values = values.view(np.uint32)
    elif not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return None
    return _grey(values, bits, tags)


def plain_samples(file: io.BytesIO, path: Path) -> FloatImage:
    """Read a TIFF that Pillow does not know: one of uncompressed grey samples of whole bytes.

    Raises:
        ImageReadError: it is of another kind.
    """
    content = file.getvalue()
    head = content[:16]
    tags = require("PIL.TiffImagePlugin", "screen").ImageFileDirectory_v2(head)
    file.seek(tags.next)
    tags.load(file)
    forms = set(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)))
    depths = set(tags.get(_BITS, (1,)))
    bits, form = max(depths), max(forms)
    if (
        tags.get(_SAMPLES, 1) != 1
        or tags.get(_COMPRESSION, 1) != 1
        or tags.get(_FILL_ORDER, 1) != 1
        or tags.get(_PHOTOMETRIC, _BLACK_IS_ZERO) not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
        or form not in _CODES
        or bits not in ((16, 32, 64) if form == _FLOAT else (8, 16, 32, 64))
        or _STRIPS not in tags
    ):
        raise ImageReadError(
            "{path} is a TIFF of a kind that is not read: {samples} {form} samples of {bits} bits, "
            "photometric interpretation {photometric}, compression {compression}; greyscale and "
            "RGB of 8 or 16 bits without compression are read",
            path=path,
            samples=tags.get(_SAMPLES, 1),
            form=_NAMES.get(form, "other"),
            bits=" and ".join(map(str, sorted(depths)[:4])),
            photometric=tags.get(_PHOTOMETRIC, "missing"),
            compression=tags.get(_COMPRESSION, 1),
        )
    width, height = tags[_WIDTH], tags[_HEIGHT]
    check_pixels(width, height, path)
    order = ">" if content.startswith(b"MM") else "<"
    strips = zip(tags[_STRIPS], tags[_STRIP_BYTES], strict=True)
    data = b"".join(content[start : start + length] for start, length in strips)
    values = np.frombuffer(data, f"{order}{_CODES[form]}{bits // 8}", width * height)
    return _grey(values.reshape(height, width), bits, tags)


def _grey(values: npt.NDArray[Any], bits: int, tags: Tags) -> FloatImage:
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if values.dtype.kind == "u" and bits <= 16:
        grey: FloatImage = values.astype(np.float32) / np.float32(2**bits - 1)
        return np.float32(1) - grey if inverted else grey
    return stretched(-values.astype(np.float64) if inverted else values)
