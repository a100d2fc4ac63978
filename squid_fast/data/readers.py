"""Read one image file of any format as a greyscale array.

The first bytes of a file tell its format, not its name: archives are full of JPEGs called
``.png``. Whatever is wrong with a file is raised as ``ImageReadError``.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..utils.extras import require
from .dicom import read_dicom
from .formats import DICOM_SUFFIXES, HEAD_BYTES, KNOWN, image_format
from .npy import read_npy
from .pixels import MAX_PIXELS, FloatImage, ImageReadError, check_pixels, stretched

_MAX_TIFF_BYTES = 2 << 30
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _TIFF_WHITE_IS_ZERO = 258, 262, 0


def read_image(path: str | os.PathLike[str]) -> FloatImage:
    """Read an image file as greyscale: float32 ``[H, W]`` in [0, 1].

    - **Integers** of 8 and 16 bits are divided by their full range (255, 65535; a TIFF of n bits
      by 2^n - 1), so 16-bit greyscale keeps its precision. Colour is reduced to ITU-R 601
      luminance with 8 bits per channel; transparency is composited over black. A JPEG gives the
      luminance that it stores: the same within 1/255, except where its colours lie outside of the
      range of RGB.
    - **Floats and wider integers** are scaled from their minimum and maximum to [0, 1], except NPY
      arrays that lie in [0, 1] already. A constant image that would be scaled so becomes zeros.
    - **Animations and multi-frame files** give their first frame. EXIF orientation is ignored.
    - **NPY**: ``[H, W]``, ``[1, H, W]`` or ``[H, W, 1]`` of bool, integers or floats.
    - **DICOM**: modality LUT, then VOI LUT or window (the first of several) scaled by its output
      range, or minimum to maximum where there is none; MONOCHROME1 is inverted last. Without a
      window, pixels with the padding value become black and count neither as minimum nor maximum.

    Raises:
        ImageReadError: the file is missing, unreadable, empty, damaged, of an unknown format or
            larger than ``MAX_PIXELS``; it changes while it is read, takes more memory than there
            is or holds a pixel that is not finite.
        ImportError: Pillow or pydicom is needed and not installed. A DICOM that takes imagecodecs
            is an ImageReadError instead, as others can be read.

    >>> np.save("scan.npy", np.array([[0, 51, 255]], dtype=np.uint8))
    >>> read_image("scan.npy")
    array([[0. , 0.2, 1. ]], dtype=float32)
    """
    return _read(Path(path), None)


def load_image(path: str | os.PathLike[str], size: int) -> FloatImage:
    """Read an image as a model takes it: float32 ``[size, size]`` in [0, 1].

    The resize is bilinear with antialiasing and does not keep the aspect ratio, as in the
    published preprocessing. A JPEG of at least four times the size per side is decoded at a half,
    a quarter or an eighth, so that the resize starts from at least twice the size. In radiographs
    this changed pixels by 0.3/255 on average, and by 2/255 at most.

    Raises:
        ImageReadError, ImportError: as ``read_image``.
        ValueError: ``size`` is less than 1.

    >>> np.save("scan.npy", np.zeros((40, 30), dtype=np.uint8))
    >>> load_image("scan.npy", 32).shape
    (32, 32)
    """
    if size < 1:
        raise ValueError(f"size is {size}; the side of an image is at least 1 pixel")
    image = _read(Path(path), size)
    if image.shape == (size, size):
        return image
    return np.clip(_resized(require("PIL.Image", "screen").fromarray(image), size), 0.0, 1.0)


def load_bytes(path: str | os.PathLike[str], size: int) -> npt.NDArray[np.uint8]:
    """Read an image as ``load_image`` does, rounded to uint8 ``[size, size]``: 255 is 1.0."""
    return (load_image(path, size) * 255 + 0.5).astype(np.uint8)


def _read(path: Path, size: int | None) -> FloatImage:
    """Read an image in [0, 1]: [H, W], or [size, size] from readers that resize as they decode."""
    _check_is_file(path)
    kind = "file"
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            try:
                kind = _kind(file.read(HEAD_BYTES), path)
                file.seek(0)
                if kind == "DICOM":
                    image = read_dicom(file, path)
                elif kind == "NPY":
                    image = read_npy(file, path)
                else:
                    image = _read_pil(file, path, kind, size)
            finally:
                _check_unchanged(before, os.fstat(file.fileno()), path)
    except (ImageReadError, ImportError):
        raise
    except PermissionError as error:
        raise ImageReadError("{path} may not be read: permission denied", path=path) from error
    except MemoryError as error:
        message = "{path} takes more memory to decode than there is"
        raise ImageReadError(message, path=path) from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = type(error).__name__ + (": {detail}" if str(error) else "")
        raise ImageReadError(
            f"{{path}} could not be decoded as {kind}, it is damaged or truncated or uses an "
            f"unsupported variant of the format ({reason})",
            path=path,
            detail=error,
        ) from error
    if not np.isfinite(image).all():
        message = "{path} holds NaN or infinite pixels; every pixel must be finite"
        raise ImageReadError(message, path=path)
    # Headers may promise fewer bits than the values have.
    return np.clip(np.ascontiguousarray(image, dtype=np.float32), 0.0, 1.0)


def _check_is_file(path: Path) -> None:
    """Refuse what is not a regular file: opening a pipe or device could block for ever."""
    wanted = "give the path of an image file"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            target, message = (
                os.readlink(path),
                "{path} is a link to {target}, which does not exist",
            )
            raise ImageReadError(message, path=path, target=target) from error
        raise ImageReadError(f"{{path}} does not exist; {wanted}", path=path) from error
    except (OSError, ValueError) as error:
        raise ImageReadError("{path} cannot be reached: {error}", path=path, error=error) from error
    if stat.S_ISDIR(mode):
        raise ImageReadError(f"{{path}} is a folder; {wanted}", path=path)
    if not stat.S_ISREG(mode):
        raise ImageReadError(f"{{path}} is a pipe or device; {wanted}", path=path)


def _kind(head: bytes, path: Path) -> str:
    if not head:
        message = f"{{path}} is empty (0 bytes); an image file of {KNOWN} is read"
        raise ImageReadError(message, path=path)
    if kind := image_format(head):
        return kind
    if path.suffix.lower() in DICOM_SUFFIXES:
        return "DICOM"  # old files lack the preamble
    raise ImageReadError(
        "{path} is not an image in a known format, it begins with {start}; "
        f"{KNOWN} are read, and the content decides, not the name",
        path=path,
        start=head[:8],
    )


def _check_unchanged(before: os.stat_result, after: os.stat_result, path: Path) -> None:
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ImageReadError(
            "{path} was changed while it was read ({before} bytes before, {after} after); read it "
            "again when it is complete",
            path=path,
            before=before.st_size,
            after=after.st_size,
        )


def _read_pil(file: BinaryIO, path: Path, kind: str, size: int | None) -> FloatImage:
    pil = require("PIL.Image", "screen")
    if kind == "TIFF":
        if (length := os.fstat(file.fileno()).st_size) > _MAX_TIFF_BYTES:
            raise ImageReadError(
                f"{{path}} has {{length}} bytes; TIFF files of at most {_MAX_TIFF_BYTES} are read",
                path=path,
                length=length,
            )
        # libtiff maps a file into memory: if the file becomes shorter, the process is killed.
        file = io.BytesIO(file.read())
    try:
        image = pil.open(file, formats=(kind,))
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise ImageReadError(
            f"{{path}} has too many pixels; at most {MAX_PIXELS} are read ({{error}})",
            path=path,
            error=error,
        ) from error
    with image:
        check_pixels(image.width, image.height, path)
        box = None
        if kind == "JPEG":
            scaled = image.draft("L", None if size is None else (2 * size, 2 * size))
            box = scaled and scaled[1]  # without the margin of sides that are no multiple of 8
        image.load()
        return _grey(image, kind, size, box)


def _grey(
    image: Any, kind: str, size: int | None, box: tuple[float, float, float, float] | None
) -> FloatImage:
    """Reduce a decoded PIL image to luminance in [0, 1]: [H, W], or [size, size] if cheaper."""
    mode: str = image.mode
    if mode.startswith("I;16") or (mode == "I" and kind == "PNG"):  # older Pillow: 16-bit PNG is I
        tags = image.tag_v2 if kind == "TIFF" else {}
        bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
        grey: FloatImage = np.asarray(image).astype(np.float32) / np.float32(2**bits - 1)
        return np.float32(1) - grey if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO else grey
    if mode in ("F", "I"):
        return stretched(np.asarray(image))
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        luminance: FloatImage = np.asarray(rgba.convert("L"), dtype=np.float32)
        opacity: FloatImage = np.asarray(rgba.getchannel("A"), dtype=np.float32)
        return np.asarray(luminance * opacity / (255 * 255), dtype=np.float32)
    if mode not in ("L", "1", "RGB"):
        image = image.convert("RGB")
    image = image.convert("L")
    if size is None or image.size == (size, size):
        values: FloatImage = np.asarray(image, dtype=np.float32)
    else:
        values = _resized(image.convert("F"), size, box)
    return np.asarray(values / 255, dtype=np.float32)


def _resized(
    image: Any, size: int, box: tuple[float, float, float, float] | None = None
) -> FloatImage:
    """Resize a PIL image of floats, or its part in ``box``, to [size, size]."""
    bilinear = require("PIL.Image", "screen").Resampling.BILINEAR  # antialiased in Pillow
    return np.asarray(image.resize((size, size), bilinear, box), dtype=np.float32)
