"""One image file, whatever its format, as one greyscale array.

A file's type is told by its first bytes, never by its name alone: archives are full of JPEGs
called ``.png``. Whatever goes wrong with a file is an :class:`ImageReadError`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from squid_fast._extras import require

FloatImage = npt.NDArray[np.float32]

MAX_PIXELS = 100_000_000
"""Images with more pixels than this are refused before they are decoded."""

IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".tif",
    ".tiff",
    ".bmp",
    ".gif",
    ".webp",
    ".npy",
    ".dcm",
    ".dicom",
)
"""What counts as an image when a folder is searched, in lower case."""

_DICOM_SUFFIXES = (".dcm", ".dicom")
_KNOWN = "PNG, JPEG, TIFF, BMP, GIF, WebP, NPY and DICOM"
_HEAD_BYTES = 132
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"\x93NUMPY", "NPY"),
    (b"BM", "BMP"),
)
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _TIFF_WHITE_IS_ZERO = 258, 262, 0


class ImageReadError(ValueError):
    """A file could not be read as an image; the message says which file and why."""


def read_image(path: str | os.PathLike[str]) -> FloatImage:
    """Read an image file as greyscale.

    - **Integers** of 8 and 16 bits are divided by their full range (255, 65535; a TIFF of n bits
      by 2^n - 1), so 16-bit greyscale keeps its precision. Colour is reduced to ITU-R 601
      luminance with 8 bits per channel; transparency is composited over black.
    - **Floats and wider integers** are scaled from their minimum and maximum to [0, 1], except NPY
      arrays that lie in [0, 1] already. A constant image that would be scaled so becomes zeros.
    - **Animations and multi-frame files** give their first frame. EXIF orientation is ignored.
    - **NPY**: ``[H, W]``, ``[1, H, W]`` or ``[H, W, 1]`` of bool, integers or floats.
    - **DICOM**: modality LUT, then VOI LUT or window (the first of several) scaled by its output
      range, or minimum to maximum where there is none; MONOCHROME1 is inverted last.

    Args:
        path: the file.

    Returns:
        float32 ``[H, W]`` in [0, 1].

    Raises:
        ImageReadError: the file is missing, unreadable, empty, damaged, of an unknown format,
            larger than ``MAX_PIXELS`` or holds no finite pixels.
        ImportError: Pillow or pydicom is needed and not installed.
    """
    path = Path(path)
    _check_is_file(path)
    kind = "file"
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
            kind = _kind(head, path)
            file.seek(0)
            image = _READERS[kind](file, path)
    except (ImageReadError, ImportError):
        raise
    except PermissionError as error:
        raise ImageReadError(f"{path} may not be read: permission denied") from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ImageReadError(
            f"{path} could not be decoded as {kind}, it is damaged or truncated or uses an "
            f"unsupported variant of the format ({detail})"
        ) from error
    if not np.isfinite(image).all():
        raise ImageReadError(f"{path} holds NaN or infinite pixels; every pixel must be finite")
    # Headers may promise fewer bits than the values have.
    return np.clip(np.ascontiguousarray(image, dtype=np.float32), 0.0, 1.0)


def load_image(path: str | os.PathLike[str], size: int) -> FloatImage:
    """Read an image and resize it to a square, as a model takes it.

    The resize is bilinear with antialiasing and does not keep the aspect ratio, as in the
    published preprocessing.

    Args:
        path: the file, see :func:`read_image`.
        size: side of the result in pixels, at least 1.

    Returns:
        float32 ``[size, size]`` in [0, 1].

    Raises:
        ImageReadError: as :func:`read_image`.
        ValueError: ``size`` is less than 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}; the side of an image is at least 1 pixel")
    image = read_image(path)
    if image.shape == (size, size):
        return image
    pil = require("PIL.Image", "screen")
    resized = pil.fromarray(image).resize((size, size), pil.Resampling.BILINEAR)
    return np.clip(np.asarray(resized, dtype=np.float32), 0.0, 1.0)


def is_dicom(path: Path) -> bool:
    """Whether the file carries DICOM's mark, ``DICM`` at byte 128; False if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD_BYTES)[128:] == b"DICM"
    except OSError:
        return False


def _check_is_file(path: Path) -> None:
    """Refuse what is no regular file; opening a pipe or device would block or never end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            target = os.readlink(path)
            raise ImageReadError(f"{path} is a link to {target}, which does not exist") from error
        raise ImageReadError(f"{path} does not exist; give the path of an image file") from error
    except (OSError, ValueError) as error:
        raise ImageReadError(f"{path} cannot be reached: {error}") from error
    if stat.S_ISDIR(mode):
        raise ImageReadError(f"{path} is a folder; give the path of an image file")
    if not stat.S_ISREG(mode):
        raise ImageReadError(f"{path} is a pipe or device; give the path of an image file")


def _kind(head: bytes, path: Path) -> str:
    if not head:
        raise ImageReadError(f"{path} is empty (0 bytes); an image file of {_KNOWN} is read")
    if head[128:132] == b"DICM":  # first: a DICOM preamble may imitate a TIFF
        return "DICOM"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if path.suffix.lower() in _DICOM_SUFFIXES:
        return "DICOM"  # old files lack the preamble
    raise ImageReadError(
        f"{path} is not an image in a known format, it begins with {head[:8]!r}; "
        f"{_KNOWN} are read, and the content decides, not the name"
    )


def _check_pixels(width: int, height: int, path: Path) -> None:
    if width < 1 or height < 1:
        raise ImageReadError(f"{path} has no pixels ({width}x{height})")
    if width * height > MAX_PIXELS:
        raise ImageReadError(
            f"{path} has {width}x{height} = {width * height} pixels; at most {MAX_PIXELS} are read"
        )


def _stretched(values: npt.NDArray[Any]) -> FloatImage:
    """Minimum to 0, maximum to 1; a constant array to 0."""
    array = values.astype(np.float64)
    low, high = float(array.min()), float(array.max())
    if not np.isfinite(low) or not np.isfinite(high):
        return np.full(array.shape, np.nan, dtype=np.float32)  # refused at the end of read_image
    if low == high:
        return np.zeros(array.shape, dtype=np.float32)
    if not np.isfinite(high - low):
        array, low, high = array / 2, low / 2, high / 2
    return ((array - low) / (high - low)).astype(np.float32)


def _read_pil(file: BinaryIO, path: Path, kind: str) -> FloatImage:
    pil = require("PIL.Image", "screen")
    try:
        image = pil.open(file, formats=(kind,))
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise ImageReadError(
            f"{path} has too many pixels; at most {MAX_PIXELS} are read ({error})"
        ) from error
    with image:
        _check_pixels(image.width, image.height, path)
        image.load()
        return _grey(image, kind)


def _grey(image: Any, kind: str) -> FloatImage:
    """A decoded PIL image as luminance [H, W] in [0, 1]."""
    mode: str = image.mode
    if mode.startswith("I;16") or (mode == "I" and kind == "PNG"):  # older Pillow: 16-bit PNG is I
        tags = image.tag_v2 if kind == "TIFF" else {}
        bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
        grey: FloatImage = np.asarray(image).astype(np.float32) / np.float32(2**bits - 1)
        return np.float32(1) - grey if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO else grey
    if mode in ("F", "I"):
        return _stretched(np.asarray(image))
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        luminance: FloatImage = np.asarray(rgba.convert("L"), dtype=np.float32)
        opacity: FloatImage = np.asarray(rgba.getchannel("A"), dtype=np.float32)
        return np.asarray(luminance * opacity / (255 * 255), dtype=np.float32)
    if mode not in ("L", "1", "RGB"):
        image = image.convert("RGB")
    values: FloatImage = np.asarray(image.convert("L"), dtype=np.float32)
    return np.asarray(values / 255, dtype=np.float32)


def _read_npy(file: BinaryIO, path: Path) -> FloatImage:
    del file  # a memory map needs the path; nothing is read before the shape is known
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.kind not in "buif":
        raise ImageReadError(
            f"{path} holds values of type {array.dtype}; bool, integers and floats are read"
        )
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[:, :, 0]
    if array.ndim != 2:
        raise ImageReadError(
            f"{path} has the shape {list(array.shape)}; [H, W], [1, H, W] and [H, W, 1] are read"
        )
    _check_pixels(array.shape[1], array.shape[0], path)
    array = np.array(array)
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        top = 255 if array.dtype.itemsize == 1 else 65535
        return np.asarray(array.astype(np.float32) / top, dtype=np.float32)
    if array.min() >= 0 and array.max() <= 1:
        return np.asarray(array, dtype=np.float32)
    return _stretched(array)


def _read_dicom(file: BinaryIO, path: Path) -> FloatImage:
    pydicom = require("pydicom", "screen")
    header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    if header.get("Rows") is None or header.get("Columns") is None:
        raise ImageReadError(
            f"{path} is a DICOM file without an image (Rows and Columns are missing; Modality is "
            f"{header.get('Modality', 'not given')}); one with pixel data is needed"
        )
    _check_pixels(int(header.Columns), int(header.Rows), path)
    file.seek(0)
    frame = _first_frame(pydicom, file, header, path)
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        frame = pydicom.pixels.apply_color_lut(frame, header)
        return _luminance(frame, np.iinfo(frame.dtype).max)
    if frame.ndim == 3:
        return _luminance(frame, 2**header.BitsStored - 1)
    return _dicom_grey(pydicom, frame, header)


def _luminance(colour: npt.NDArray[Any], top: int) -> FloatImage:
    """ITU-R 601 luma of [H, W, 3 or 4], as Pillow's."""
    weights = np.array([0.299, 0.587, 0.114])
    return np.asarray(colour[..., :3] @ weights / top, dtype=np.float32)


def _first_frame(pydicom: Any, file: BinaryIO, header: Any, path: Path) -> npt.NDArray[Any]:
    """The stored values of frame 0: [H, W], or [H, W, 3] in RGB."""
    pixels = require("pydicom.pixels", "screen")
    source: Any = file
    if "TransferSyntaxUID" not in getattr(header, "file_meta", {}):  # a file without its preamble
        source = pydicom.dcmread(file, force=True)
        source.file_meta = pydicom.dataset.FileMetaDataset()
        implicit, little = header.original_encoding
        source.file_meta.TransferSyntaxUID = (
            pydicom.uid.ImplicitVRLittleEndian
            if implicit
            else pydicom.uid.ExplicitVRLittleEndian
            if little
            else pydicom.uid.ExplicitVRBigEndian
        )
    try:
        frame: npt.NDArray[Any] = pixels.pixel_array(source, index=0)
    except AttributeError as error:
        raise ImageReadError(
            f"{path} is a DICOM file without usable pixel data: {error}"
        ) from error
    return frame


def _dicom_grey(pydicom: Any, stored: npt.NDArray[Any], header: Any) -> FloatImage:
    """Modality, then values of interest, then polarity (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2)."""
    if header.get("ModalityLUTSequence"):
        values, _ = _looked_up(stored, header.ModalityLUTSequence[0])
    else:
        values = pydicom.pixels.apply_modality_lut(stored, header)
    if header.get("VOILUTSequence"):
        values, top = _looked_up(values, header.VOILUTSequence[0])
        grey = np.asarray(values / top, dtype=np.float32)
    elif header.get("WindowCenter") is not None and header.get("WindowWidth") is not None:
        # The window's own output range: where everything below and everything above it goes.
        ends = pydicom.pixels.apply_windowing(np.array([-np.inf, np.inf]), header)
        windowed = pydicom.pixels.apply_windowing(values, header)
        low, high = float(ends[0]), float(ends[1])
        if low == high:
            return np.zeros(stored.shape, dtype=np.float32)
        grey = np.asarray((windowed - low) / (high - low), dtype=np.float32)
    else:
        grey = _stretched(values)
        if not grey.any():
            return grey
    return (
        np.float32(1) - grey if header.get("PhotometricInterpretation") == "MONOCHROME1" else grey
    )


def _looked_up(values: npt.NDArray[Any], item: Any) -> tuple[npt.NDArray[Any], int]:
    """Values through a lookup table, and the top of the table's range.

    pydicom's own functions hold the index in the type of the table's entries, which overflows
    for 12-bit values and a table of 8-bit entries.
    """
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = entries or 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, dtype="<u2" if len(data) >= 2 * entries else "u1")
    table = np.asarray(data)[:entries]
    if table.size == 0:
        raise ValueError("its lookup table has no entries")
    index = np.clip(np.floor(values).astype(np.int64) - first, 0, table.size - 1)
    return table[index], 2**bits - 1


def _pil_reader(kind: str) -> Callable[[BinaryIO, Path], FloatImage]:
    return lambda file, path: _read_pil(file, path, kind)


_READERS: dict[str, Callable[[BinaryIO, Path], FloatImage]] = {
    **{kind: _pil_reader(kind) for kind in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")},
    "NPY": _read_npy,
    "DICOM": _read_dicom,
}
