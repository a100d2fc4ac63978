"""Read one image file of any format as a greyscale array.

The first bytes of a file tell its format, not its name: archives are full of JPEGs called
``.png``. Whatever is wrong with a file is raised as ``ImageReadError``.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ..utils.extras import require
from .dicom.reader import read_dicom
from .formats import GZIP, HEAD_BYTES, KNOWN, image_format, unread_format, unzipped
from .npy import read_npy
from .pillow import read_with_pillow, resized
from .pixels import FloatImage, ImageReadError

_MAX_UNZIPPED = 1 << 29  # bytes
# What libraries say of files that are whole, and words that are meant for programmers.
_UNSUPPORTED = re.compile(
    "(?i)unsupported|not (yet )?(supported|implemented)|cannot handle|unable to determine"
)
_INTERNAL = re.compile(
    r"[_<>{}\\\n]|\b(array|buffer|object|argument|codec|decoder|driver|literal|unpack|shape|tile|tag)\b"
)


def read_image(path: str | os.PathLike[str]) -> FloatImage:
    """Read an image file as greyscale: float32 ``[H, W]`` in [0, 1].

    - **Formats**: PNG, JPEG, JPEG 2000, TIFF, BMP, GIF, WebP, AVIF, PNM, NPY and DICOM, each also
      compressed by gzip. What of a format is not read is refused and named.
    - **Integers** without sign, of up to 16 bits, are divided by their full range (2^n - 1 for n
      bits), so 16-bit greyscale keeps its precision. Colour is reduced to ITU-R 601 luminance with
      8 bits per channel; transparency is composited over black. A JPEG gives the luminance that it
      stores: the same within 1/255, except where its colours lie outside of the range of RGB.
    - **Floats and other integers** are scaled from their minimum and maximum to [0, 1], except NPY
      arrays that lie in [0, 1] already. A constant image that would be scaled so becomes zeros.
    - **Animations and multi-frame files** give their first frame, a TIFF its first page that is
      no thumbnail. Orientations that TIFF or EXIF ask for, colour profiles and gamma are ignored.
      A TIFF that is white at zero is inverted.
    - **NPY**: ``[H, W]``, ``[1, H, W]`` or ``[H, W, 1]`` of bool, integers or floats.
    - **DICOM**: modality LUT, then VOI LUT or window (the first of several) scaled by its output
      range, or minimum to maximum where there is none; MONOCHROME1 is inverted last, whatever the
      Presentation LUT Shape is. Without a window, pixels with the padding value become black and
      count neither as minimum nor maximum.

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
    return np.clip(resized(require("PIL.Image", "screen").fromarray(image), size), 0.0, 1.0)


def load_bytes(path: str | os.PathLike[str], size: int) -> npt.NDArray[np.uint8]:
    """Read an image as ``load_image`` does, rounded to uint8 ``[size, size]``: 255 is 1.0."""
    return (load_image(path, size) * 255 + 0.5).astype(np.uint8)


def _read(path: Path, size: int | None) -> FloatImage:
    """Read an image in [0, 1]: [H, W], or [size, size] from readers that resize as they decode."""
    _check_is_file(path)
    kind = "an image"
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            try:
                head = file.read(HEAD_BYTES)
                kind = _kind(head, path)
                file.seek(0)
                source = _unzipped(file, path) if head.startswith(GZIP) else file
                if kind == "DICOM":
                    image = read_dicom(_with_preamble(source, unzipped(head)), path)
                elif kind == "NPY":
                    image = read_npy(source, path)
                else:
                    image = read_with_pillow(source, path, kind, size)
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
        raise _undecodable(error, kind, path) from error
    if not np.isfinite(image).all():
        message = "{path} holds NaN or infinite pixels; every pixel must be finite"
        raise ImageReadError(message, path=path)
    # Headers may promise fewer bits than the values have.
    return np.clip(np.ascontiguousarray(image, dtype=np.float32), 0.0, 1.0)


def _undecodable(error: Exception, kind: str, path: Path) -> ImageReadError:
    """What a decoder's error comes to, with its own words where they are meant for people."""
    if isinstance(error, OSError) and error.strerror:
        reason = OSError(error.strerror)
        return ImageReadError("{path} cannot be read: {reason}", path=path, reason=reason)
    if isinstance(error.args[0] if error.args else None, Exception):
        error = error.args[0]  # Pillow's way to pass an error on
    text = re.sub(r"\bb'([^']*)'", r"\1", str(error))
    ours = isinstance(error, (OSError, ValueError, SyntaxError, RuntimeError))
    plain = ours and re.search("[a-z]", text) and not _INTERNAL.search(text)
    detail = " ({detail})" if plain else ""
    if isinstance(error, NotImplementedError) or _UNSUPPORTED.search(text):
        message = f"{{path}} uses a variant of {kind} that is not read{detail}"
    else:
        message = f"{{path}} could not be decoded as {kind}, it is damaged or truncated{detail}"
    return ImageReadError(message, path=path, detail=ValueError(text[:200]))


def _check_is_file(path: Path) -> None:
    """Refuse what is not a regular file: opening a pipe or device could block for ever."""
    wanted = "give the path of an image file"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            message = "{path} is a link to {target}, which does not exist"
            raise ImageReadError(message, path=path, target=os.readlink(path)) from error
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
    if not unzipped(head):
        message = "{path} is compressed by gzip and empty or damaged"
        raise ImageReadError(message, path=path)
    if kind := image_format(head):
        return kind
    if other := unread_format(head):
        message = f"{{path}} is {other}, which is not read; {KNOWN} are"
        raise ImageReadError(message, path=path)
    raise ImageReadError(
        "{path} is not an image in a known format, it begins with {start}; "
        f"{KNOWN} are read, and the content decides, not the name",
        path=path,
        start=unzipped(head)[:8],
    )


def _unzipped(file: BinaryIO, path: Path) -> BinaryIO:
    """What a file compressed by gzip holds, in memory."""
    try:
        content = gzip.GzipFile(fileobj=file).read(_MAX_UNZIPPED + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        message = "{path} could not be decompressed, it is damaged or truncated"
        raise ImageReadError(message, path=path) from error
    if len(content) > _MAX_UNZIPPED:
        raise ImageReadError(
            f"{{path}} decompresses to more than {_MAX_UNZIPPED} bytes, which is the most that is "
            "read",
            path=path,
        )
    return io.BytesIO(content)


def _with_preamble(file: BinaryIO, head: bytes) -> BinaryIO:
    """A DICOM file that begins with the mark alone, completed."""
    return io.BytesIO(bytes(128) + file.read()) if head.startswith(b"DICM") else file


def _check_unchanged(before: os.stat_result, after: os.stat_result, path: Path) -> None:
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ImageReadError(
            "{path} was changed while it was read ({before} bytes before, {after} after); read it "
            "again when it is complete",
            path=path,
            before=before.st_size,
            after=after.st_size,
        )
