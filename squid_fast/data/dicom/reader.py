"""Images in DICOM files: the first frame, as grey levels."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...utils.extras import require
from ..pixels import LUMA, FloatImage, ImageReadError, check_pixels
from .grey import colours_of_palette, grey_levels
from .header import Header
from .stored import read_frame

_MAX_INFLATED = 1 << 29  # bytes
_DEFLATED = "1.2.840.10008.1.2.1.99"
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # as float32, as float64, as integers


def read_dicom(file: BinaryIO, path: Path) -> FloatImage:
    """Read the first frame as an image, [H, W] in [0, 1]; see ``read_image``."""
    require("pydicom", "screen")
    try:
        header, pixels, syntax = _opened(file, path)
        return _image(header, pixels, syntax, path)
    except (ImageReadError, ImportError, MemoryError):
        raise
    except Exception as error:  # pydicom raises nearly anything on damaged files
        if isinstance(error, OSError) and error.errno:
            raise
        raise ImageReadError(
            "{path} could not be decoded as DICOM, it is damaged or truncated", path=path
        ) from error


def _image(header: Header, pixels: BinaryIO, syntax: str, path: Path) -> FloatImage:
    if not header.values("Rows") or not header.values("Columns"):
        raise ImageReadError(
            "{path} is a DICOM file without an image, or cut short (Rows and Columns are missing; "
            "Modality is {modality}); one with pixel data is needed",
            path=path,
            modality=header.text("Modality") or "not given",
        )
    check_pixels(header.needed("Columns"), header.needed("Rows"), path)
    stored, raw = read_frame(pixels, header, syntax)
    if header.text("PhotometricInterpretation") == "PALETTE COLOR":
        return _luminance(*colours_of_palette(header, stored))
    if stored.ndim == 3:
        return _luminance(stored, 2 ** header.needed("BitsStored") - 1)
    with np.errstate(over="ignore"):  # slopes and windows of any size; infinite pixels are refused
        return grey_levels(header, stored, raw)


def _luminance(colour: npt.NDArray[Any], top: int) -> FloatImage:
    """Reduce colours [H, W, 3] to ITU-R 601 luma, as Pillow does."""
    return np.asarray(colour @ LUMA / top, dtype=np.float32)


def _opened(file: BinaryIO, path: Path) -> tuple[Header, BinaryIO, str]:
    """Read all up to the pixels: the elements, a file at the pixels, and the transfer syntax.

    What the data set is encoded in is told by its first element, not by the transfer syntax.
    """
    head = file.read(132)
    file.seek(132 if head[128:] == b"DICM" else 4 if head[:4] == b"DICM" else 0)
    meta = Header(_elements(file, lambda tag: tag >> 16 != 2), path)
    _elements(file, lambda tag: tag >> 16 != 0)  # a command, if it was taken from a network
    syntax = meta.text("TransferSyntaxUID")
    if syntax == _DEFLATED:
        file = _inflated(file, path)
    encoding = _encoding(file)
    header = Header(_elements(file, _PIXELS.__contains__), path, *encoding)
    return header, file, syntax


def _elements(file: BinaryIO, stop: Any) -> Any:
    """Read elements until the tag of one is told to ``stop``; the file is then at that element."""
    implicit, little_endian = _encoding(file)
    return require("pydicom.filereader", "screen").read_dataset(
        file, implicit, little_endian, stop_when=lambda tag, vr, length: stop(tag)
    )


def _encoding(file: BinaryIO) -> tuple[bool, bool]:
    """Whether the element at which a file is has no VR, and whether it is little endian."""
    start = file.read(6)
    file.seek(-len(start), os.SEEK_CUR)
    # Data sets begin with small group numbers, which are large with their bytes swapped.
    little_endian = int.from_bytes(start[:2], "little") <= int.from_bytes(start[:2], "big")
    vr = start[4:]
    return not (vr.isalpha() and vr.isupper()), little_endian


def _inflated(file: BinaryIO, path: Path) -> io.BytesIO:
    """Inflate a data set, unless it is too large."""
    start = file.read(2)
    file.seek(-len(start), os.SEEK_CUR)
    # Some writers put zlib's header before it, which PS3.5 A.5 does not have.
    has_header = start[:1] == b"\x78" and int.from_bytes(start, "big") % 31 == 0
    bits = zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS
    inflate, data = zlib.decompressobj(bits), io.BytesIO()
    while piece := file.read(1 << 16):
        try:
            data.write(inflate.decompress(piece, _MAX_INFLATED + 1 - data.tell()))
        except zlib.error as error:
            raise ImageReadError(
                "{path} could not be decoded as DICOM: its transfer syntax says that it is "
                "deflated, but it is not, or damaged",
                path=path,
            ) from error
        if data.tell() > _MAX_INFLATED:
            raise ImageReadError(
                "{path} is a DICOM file that inflates to more than "
                f"{_MAX_INFLATED} bytes, which is the most that is read",
                path=path,
            )
    data.seek(0)
    return data
