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
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..utils.extras import require
from .dicom import read_dicom
from .formats import GZIP, HEAD_BYTES, KNOWN, image_format, unread_format, unzipped
from .headers import bmp_bits, jpeg_2000_bits, jpeg_variant, png_depth
from .npy import read_npy
from .pixels import MAX_PIXELS, FloatImage, ImageReadError, check_pixels, stretched
from .tiff import is_misread, load_as_stored, other_samples, wide_samples

_MAX_TIFF_BYTES = 2 << 30
_MAX_UNZIPPED = 1 << 29  # bytes
_PILLOW = {"JPEG 2000": "JPEG2000", "PNM": "PPM", "WebP": "WEBP"}  # where its names differ
_CODECS = {"AVIF": "avif", "JPEG 2000": "jpg_2000", "WebP": "webp"}  # that Pillow may lack
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
    - **Animations and multi-frame files** give their first frame. Orientations that TIFF or EXIF
      ask for, colour profiles and gamma are ignored. A TIFF that is white at zero is inverted.
    - **NPY**: ``[H, W]``, ``[1, H, W]`` or ``[H, W, 1]`` of bool, integers or floats.
    - **DICOM**: modality LUT, then VOI LUT or window (the first of several) scaled by its output
      range, or minimum to maximum where there is none; MONOCHROME1 is inverted last.

    Raises:
        ImageReadError: the file is missing, unreadable, empty, damaged, of an unknown format or
            larger than ``MAX_PIXELS``; it changes while it is read, takes more memory than there
            is or holds a pixel that is not finite.
        ImportError: Pillow or pydicom is needed and not installed.

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
                    image = _read_pil(source, path, kind, size)
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


def _read_pil(file: BinaryIO, path: Path, kind: str, size: int | None) -> FloatImage:
    if kind == "TIFF":
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        if length > _MAX_TIFF_BYTES:
            raise ImageReadError(
                f"{{path}} has {{length}} bytes; TIFF files of at most {_MAX_TIFF_BYTES} are read",
                path=path,
                length=length,
            )
        # libtiff maps a file into memory: if the file becomes shorter, the process is killed.
        file = io.BytesIO(file.read())
    try:
        return _decoded(file, path, kind, size)
    except (OSError, SyntaxError) as error:
        if kind == "JPEG" and (variant := jpeg_variant(file)):
            message = (
                f"{{path}} is {variant}, which is not read; baseline and progressive JPEGs are"
            )
            raise ImageReadError(message, path=path) from error
        raise


def _decoded(file: BinaryIO, path: Path, kind: str, size: int | None) -> FloatImage:
    try:
        image = _opened(file, path, kind)
    except SyntaxError:
        if kind == "TIFF":
            return other_samples(file, path)
        raise
    with image:
        check_pixels(image.width, image.height, path)
        if kind == "TIFF":
            if is_misread(image):
                return other_samples(file, path)
            image, tags = load_as_stored(image)
            wide = wide_samples(image, tags)
            return _grey(image, kind, size, None) if wide is None else wide
        if kind == "PNG":
            _check_png(image, *png_depth(file), path)
        if kind == "BMP":
            _check_bmp(image, bmp_bits(file), path)
        bits = jpeg_2000_bits(file) if kind == "JPEG 2000" else 8
        box = None
        if kind == "JPEG":
            wanted = None if size is None else (2 * size, 2 * size)
            if size is not None and min(image.size) >= 4 * size and jpeg_variant(file):
                wanted = (
                    None  # a lossless one is not decoded at a part of its size: old Pillows die
                )
            scaled = image.draft("L", wanted)
            box = scaled and scaled[1]  # without the margin of sides that are no multiple of 8
        image.load()
        grey = _grey(image, kind, size, box)
    if bits == 8 or (bits > 8 and image.mode != "I;16"):
        return grey
    top = 16 if bits > 8 else 8  # bits that Pillow fills up with zeros from below
    return grey * np.float32((2**top - 1) / (2**top - 2 ** (top - bits)))


def _opened(file: BinaryIO, path: Path, kind: str) -> Any:
    pil = require("PIL.Image", "screen")
    if kind in _CODECS and not require("PIL.features", "screen").check(_CODECS[kind]):
        message = f"{{path}} is in {kind}, which the installed Pillow cannot decode; the newest can"
        raise ImageReadError(message, path=path)
    name = _PILLOW.get(kind, kind)
    try:
        return pil.open(file, formats=(name,))
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise ImageReadError(
            f"{{path}} has too many pixels; at most {MAX_PIXELS} are read ({{error}})",
            path=path,
            error=error,
        ) from error
    except pil.UnidentifiedImageError:
        # Pillow keeps the reason to itself; its reader of the format does not.
        file.seek(0)
        return pil.OPEN[name][0](file, "")


def _check_png(image: Any, bits: int, is_grey: bool, path: Path) -> None:
    """Correct and refuse what Pillow reads wrongly."""
    clear = image.info.get("transparency")
    if image.mode == "P" and image.palette is None:
        raise ImageReadError("{path} is a PNG without the palette that it needs", path=path)
    if clear is not None and bits == 16 and not is_grey:
        message = "{path} is a PNG of 16-bit colour with a transparent colour, which is not read"
        raise ImageReadError(message, path=path)
    if isinstance(clear, int) and is_grey and clear < 2**bits < 256:
        # Pixels of 1, 2 and 4 bits are widened to 8, but not the value of the transparent ones.
        image.info["transparency"] = clear * 255 // (2**bits - 1)


def _check_bmp(image: Any, bits: int, path: Path) -> None:
    """Refuse grey palettes for which Pillow takes wider or narrower pixels than there are."""
    if {"1": 1, "L": 8}.get(image.mode, bits) != bits:
        message = f"{{path}} is a BMP of {bits} bits with a short grey palette, which is not read"
        raise ImageReadError(message, path=path)


def _grey(
    image: Any, kind: str, size: int | None, box: tuple[float, float, float, float] | None
) -> FloatImage:
    """Reduce a decoded PIL image to luminance in [0, 1]: [H, W], or [size, size] if cheaper."""
    mode: str = image.mode
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PNM")):  # I where Pillow is old
        grey: FloatImage = np.asarray(image).astype(np.float32)
        if (clear := image.info.get("transparency")) is not None:
            grey[grey == clear] = 0
        return grey / np.float32(65535)
    if mode in ("F", "I"):
        return stretched(np.asarray(image))
    if mode == "La":  # multiplied by its alpha, which is what lying over black does
        return np.asarray(image)[..., 0] / np.float32(255)
    if mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        luminance: FloatImage = np.asarray(rgba.convert("L"), dtype=np.float32)
        opacity: FloatImage = np.asarray(rgba.getchannel("A"), dtype=np.float32)
        if kind == "BMP" and not opacity.any():
            return luminance / np.float32(255)  # a fourth byte that nobody filled in
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
