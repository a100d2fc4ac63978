"""TIFF, where Pillow reads it otherwise than documented here, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..utils.extras import require
from .pixels import LUMA, FloatImage, ImageReadError, check_pixels, stretched

_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 254, 258, 259, 262, 274
_SAMPLES, _PLANES, _COLOURS, _SAMPLE_FORMAT = 277, 284, 320, 339
_WHITE_IS_ZERO, _RGB = 0, 2  # 1 is black
_UNSIGNED, _SIGNED = 1, 2
_ALPHA = 2  # an extra sample that the others are not multiplied by
_SEPARATE, _OLD_JPEG, _WEBP = 2, 6, 50001
_REDUCED = 1  # the bit of a page that is another one made smaller
_MAX_THUMBNAILS = 16  # that are passed over: pages may follow each other in a circle
_TURNED_TWICE = ("I;16BS", "I;32BS", "F;32BF")  # raw modes

Tags = Mapping[int, Any]

for _library in ("tifffile", "PIL"):
    logging.getLogger(_library).addHandler(logging.NullHandler())  # errors are raised, not printed


def seek_picture(image: Any) -> None:
    """Go to the first page of an opened TIFF that is no thumbnail, if there is one."""
    with suppress(EOFError):
        for page in range(_MAX_THUMBNAILS + 1):
            image.seek(page)
            if not image.tag_v2.get(_SUBFILE, 0) & _REDUCED:
                return
    image.seek(0)


def is_misread(image: Any) -> bool:
    """Whether Pillow, as of version 13, decodes an opened TIFF to wrong values, or cannot.

    It turns the bytes of compressed big-endian samples once more after libtiff did, mixes up
    separate planes unless there are three of 8 bits, and inverts grey of unknown photometric
    interpretation. Its libtiff takes WebP for damage.
    """
    tags = image.tag_v2
    codec, _, _, arguments = image.tile[0]
    separate = tags.get(_PLANES) == _SEPARATE and tags.get(_SAMPLES, 1) > 1
    return (
        (codec == "libtiff" and arguments[0] in _TURNED_TWICE)
        or (separate and tuple(tags.get(_BITS, (1,))) != (8, 8, 8))
        or tags.get(_COMPRESSION) == _WEBP
        or (_PHOTOMETRIC not in tags and tags.get(_COMPRESSION) != _OLD_JPEG)
    )


def load_as_stored(image: Any) -> tuple[Any, Tags]:
    """Decode an opened TIFF and undo the turn that Pillow gives it; the image and its tags."""
    orientation = image.getexif().get(_ORIENTATION)
    image.load()
    colours = np.array(image.tag_v2.get(_COLOURS, ()))
    if image.mode == "P" and 0 < colours.max(initial=0) < 256:
        # Of 8 bits instead of 16, which Pillow takes for black.
        image.putpalette(colours.reshape(3, -1).T.astype(np.uint8).tobytes())
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
    (bits, *_), (form, *_) = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))
    photometric = tags.get(_PHOTOMETRIC)
    if image.mode.startswith("I;16"):
        return _shade(np.asarray(image), bits, photometric)
    if image.mode == "F":
        return _shade(np.asarray(image), None, photometric)
    if image.mode == "L" and form == _SIGNED:
        return _shade(np.asarray(image).view(np.int8), None, photometric)
    if image.mode == "I":
        values: npt.NDArray[Any] = np.asarray(image)  # int32, whatever the samples are
        wraps = form == _UNSIGNED and bits == 32
        return _shade(values.view(np.uint32) if wraps else values, None, photometric)
    return None


def other_samples(file: BinaryIO, path: Path) -> FloatImage:
    """Read a TIFF that Pillow does not know, such as one of float64 or of 16 bits with alpha.

    Raises:
        ImageReadError: tifffile does not know it either, or is not installed.
    """
    try:
        tifffile = require("tifffile", "screen")
    except ImportError as error:
        message = "{path} is a TIFF of a kind that Pillow does not know: {error}"
        raise ImageReadError(message, path=path, error=error) from error
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        pages = islice(tiff.pages, _MAX_THUMBNAILS + 1)
        page = next((page for page in pages if not page.is_reduced), tiff.pages[0])
        check_pixels(page.imagewidth, page.imagelength, path)
        colours = 3 if page.photometric == _RGB else 1
        if not _is_known(page, colours):
            raise _refusal(page, path)
        try:
            values = page.asarray(maxworkers=1)
        except Exception as error:
            # Some compressions and packed bits take imagecodecs, which may be missing.
            if not isinstance(error, ImportError) and "imagecodecs" not in str(error):
                raise
            raise _refusal(page, path) from error
    if values.ndim == 2:
        values = values[..., None]
    elif page.axes == "SYX":
        values = np.moveaxis(values, 0, -1)
    grey = values[..., 0] if colours == 1 else values[..., :colours] @ LUMA
    shade = _shade(grey, page.bitspersample if _is_narrow(page) else None, page.photometric)
    if _ALPHA not in page.extrasamples:  # that is, premultiplied or of no meaning
        return shade
    return shade * (values[..., colours] / np.float32(2**page.bitspersample - 1))


def _is_narrow(page: Any) -> bool:
    return page.dtype is not None and page.dtype.kind == "u" and page.bitspersample <= 16


def _is_known(page: Any, colours: int) -> bool:
    """Whether a page of tifffile is grey or RGB, by itself or with one more sample."""
    return (
        _PHOTOMETRIC in page.tags
        and page.photometric <= _RGB
        and page.dtype is not None
        and page.dtype.kind in "uif"
        and (page.bitspersample <= 16 or page.bitspersample in (32, 64))  # 24 come in two orders
        and 0 <= page.samplesperpixel - colours <= 1
        and (_is_narrow(page) or _ALPHA not in page.extrasamples)
    )


def _refusal(page: Any, path: Path) -> ImageReadError:
    return ImageReadError(
        "{path} is a TIFF of a kind that is not read: {samples} samples of {bits} bits, sample "
        "format {form}, photometric interpretation {photometric}, compression {compression}; "
        "saved without compression, in 8 or 16 bits, it would be",
        path=path,
        samples=page.samplesperpixel,
        bits=page.bitspersample,
        form=page.sampleformat,
        photometric=page.photometric if _PHOTOMETRIC in page.tags else "missing",
        compression=page.compression,
    )


def _shade(values: npt.NDArray[Any], bits: int | None, photometric: int | None) -> FloatImage:
    """Scale samples to [0, 1]: by their range of so many bits, from minimum to maximum if None."""
    inverted = photometric == _WHITE_IS_ZERO
    if bits is None:
        return stretched(-values.astype(np.float64) if inverted else values)
    grey: FloatImage = values.astype(np.float32) / np.float32(2**bits - 1)
    return np.float32(1) - grey if inverted else grey
