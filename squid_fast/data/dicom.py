"""Images in DICOM files: the pixels of the first frame, and the values they stand for."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..utils.extras import require
from .pixels import FloatImage, ImageReadError, check_pixels, stretched

_MAX_INFLATED = 1 << 29  # bytes
_META_START = 144  # offset of the file meta information, behind the element with its length
_META_BYTES = 4096  # enough for all of it


def read_dicom(file: BinaryIO, path: Path) -> FloatImage:
    """Read the first frame as an image, [H, W] in [0, 1]; see ``read_image``."""
    pydicom = require("pydicom", "screen")
    _check_inflated(pydicom, file, path)
    header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    if header.get("Rows") is None or header.get("Columns") is None:
        raise ImageReadError(
            "{path} is a DICOM file without an image (Rows and Columns are missing; Modality is "
            "{modality}); one with pixel data is needed",
            path=path,
            modality=header.get("Modality", "not given"),
        )
    check_pixels(int(header.Columns), int(header.Rows), path)
    file.seek(0)
    frame = _first_frame(pydicom, file, header, path)
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        frame = pydicom.pixels.apply_color_lut(frame, header)
        return _luminance(frame, np.iinfo(frame.dtype).max)
    if frame.ndim == 3:
        return _luminance(frame, 2**header.BitsStored - 1)
    return _dicom_grey(pydicom, frame, header)


def _check_inflated(pydicom: Any, file: BinaryIO, path: Path) -> None:
    """Refuse a deflated dataset that is too large: pydicom inflates one of any size."""
    if pydicom.uid.DeflatedExplicitVRLittleEndian.encode() not in file.read(_META_BYTES):
        file.seek(0)
        return
    file.seek(_META_START + pydicom.filereader.read_file_meta_info(path)[0x00020000].value)
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while piece := file.read(1 << 16):
        size += len(inflate.decompress(piece))
        if size > _MAX_INFLATED:
            raise ImageReadError(
                "{path} is a DICOM file that inflates to more than "
                f"{_MAX_INFLATED} bytes, which is the most that is read",
                path=path,
            )
    file.seek(0)


def _luminance(colour: npt.NDArray[Any], top: int) -> FloatImage:
    """Reduce colours [H, W, 3 or 4] to ITU-R 601 luma, as Pillow does."""
    weights = np.array([0.299, 0.587, 0.114])
    return np.asarray(colour[..., :3] @ weights / top, dtype=np.float32)


def _first_frame(pydicom: Any, file: BinaryIO, header: Any, path: Path) -> npt.NDArray[Any]:
    """Read the stored values of frame 0: [H, W], or [H, W, 3] in RGB."""
    source: Any = file
    syntax = getattr(header, "file_meta", {}).get("TransferSyntaxUID")
    if syntax is None:  # a file without its preamble
        source = pydicom.dcmread(file, force=True)
        source.file_meta = pydicom.dataset.FileMetaDataset()
        implicit, little = header.original_encoding
        name = f"{'Implicit' if implicit else 'Explicit'}VR{'Little' if little else 'Big'}Endian"
        source.file_meta.TransferSyntaxUID = getattr(pydicom.uid, name)
    elif syntax.is_deflated:  # pydicom finds a single frame only in a file that is not deflated
        source = pydicom.dcmread(file)
    try:
        return np.asarray(pydicom.pixels.pixel_array(source, index=0))
    except AttributeError as error:
        raise ImageReadError(
            "{path} is a DICOM file without usable pixel data: {error}", path=path, error=error
        ) from error


def _dicom_grey(pydicom: Any, stored: npt.NDArray[Any], header: Any) -> FloatImage:
    """Apply modality LUT, VOI LUT or window, and polarity (PS3.3 C.11.1, C.11.2, C.7.6.3.1.2)."""
    if header.get("ModalityLUTSequence"):
        values, _ = _looked_up(stored, header.ModalityLUTSequence[0])
    else:
        values = pydicom.pixels.apply_modality_lut(stored, header)
    if header.get("VOILUTSequence"):
        values, top = _looked_up(values, header.VOILUTSequence[0])
        grey = np.asarray(values / top, dtype=np.float32)
    elif header.get("WindowCenter") is not None and header.get("WindowWidth") is not None:
        # The window's output range: what values far below and far above it become.
        low, high = pydicom.pixels.apply_windowing(np.array([-np.inf, np.inf]), header).tolist()
        windowed = pydicom.pixels.apply_windowing(values, header)
        if low == high:
            return np.zeros(stored.shape, dtype=np.float32)
        grey = np.asarray((windowed - low) / (high - low), dtype=np.float32)
    else:
        grey = stretched(values)
        if not grey.any():
            return grey
    inverted = header.get("PhotometricInterpretation") == "MONOCHROME1"
    return np.float32(1) - grey if inverted else grey


def _looked_up(values: npt.NDArray[Any], item: Any) -> tuple[npt.NDArray[Any], int]:
    """Map values through a lookup table; returns them and the top of the table's range.

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
