"""Image files put together byte by byte, so that no library says what should be read from them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

LUMA = np.array([0.299, 0.587, 0.114])


def slope(top: float, height: int = 12, width: int = 16) -> NDArray[np.float64]:
    """Values from 0 to ``top``, each its own, whatever way the picture is turned."""
    return np.linspace(0, top, height * width).reshape(height, width)


def stretch(values: NDArray) -> NDArray[np.float64]:
    wide = values.astype(np.float64)
    return (wide - wide.min()) / (wide.max() - wide.min())


def packed(values: NDArray, bits: int) -> list[bytes]:
    """Rows of samples of so many bits, the first in the highest bits of a byte."""
    apart = (values[..., None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    return [np.packbits(row.astype(np.uint8).ravel()).tobytes() for row in apart]


def chunk(name: bytes, data: bytes) -> bytes:
    size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(name + data))
    return size + name + data + check


def png(
    values: NDArray, bits: int, colour: int = 0, chunks: Mapping[bytes, bytes] | None = None
) -> bytes:
    """A PNG of [H, W] or [H, W, channels]; ``colour`` is 0 grey, 2 RGB, 3 palette, 4 with alpha."""
    rows = packed(values.reshape(len(values), -1), bits)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    extra = b"".join(chunk(name, data) for name, data in (chunks or {}).items())
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


def tiff(
    values: NDArray,
    photometric: int | None = 1,
    bits: int | None = None,
    order: str = "<",
    deflate: bool = False,
    separate: bool = False,
    tags: Mapping[int, Sequence[int]] | None = None,
) -> bytes:
    """A TIFF of one strip, or of one for each channel if these are ``separate``.

    ``values`` are [H, W] or [H, W, channels]. Their type gives the sample format, and the bits
    unless these are given. ``tags`` are of the type SHORT.
    """
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    planes = list(np.moveaxis(values, -1, 0)) if separate else [values]
    typed = values.dtype.newbyteorder(order)
    strips = [
        plane.astype(typed).tobytes()
        if bits in (None, 8 * values.dtype.itemsize)
        else b"".join(packed(plane, bits or 0))
        for plane in planes
    ]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    shorts: dict[int, Sequence[int]] = {
        256: [width],
        257: [height],
        258: [bits or 8 * values.dtype.itemsize] * channels,
        259: [8 if deflate else 1],
        277: [channels],
        278: [height],
        284: [2 if separate else 1],
        339: [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels,
        **({} if photometric is None else {262: [photometric]}),
        **(tags or {}),
    }
    start = 8 + 2 + 12 * (len(shorts) + 2) + 4
    behind = b""  # what does not fit into an entry, then the strips
    entries = {}
    for tag, numbers in shorts.items():
        value = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(value) > 4:
            value, behind = struct.pack(f"{order}I", start + len(behind)), behind + value
        entries[tag] = struct.pack(f"{order}HHI", tag, 3, len(numbers)) + value.ljust(4, b"\0")
    lengths = [len(strip) for strip in strips]
    at = start + len(behind) + (8 * len(strips) if len(strips) > 1 else 0)
    offsets = [at + sum(lengths[:index]) for index in range(len(strips))]
    for tag, numbers in ((273, offsets), (279, lengths)):
        value = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(value) > 4:
            value, behind = struct.pack(f"{order}I", start + len(behind)), behind + value
        entries[tag] = struct.pack(f"{order}HHI", tag, 4, len(numbers)) + value
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    directory = struct.pack(f"{order}H", len(entries))
    directory += b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    return head + directory + behind + b"".join(strips)


def bmp(
    rows: Sequence[bytes],
    width: int,
    bits: int,
    palette: bytes = b"",
    colours: int = 0,
    compression: int = 0,
    masks: bytes = b"",
    core: bool = False,
    top_down: bool = False,
) -> bytes:
    """A bitmap of rows from top to bottom; with ``core`` in the form of OS/2."""
    ordered = rows if top_down else rows[::-1]
    pixels = b"".join(row + bytes(-len(row) % 4) for row in ordered)
    height = -len(rows) if top_down else len(rows)
    if core:
        header = struct.pack("<IHHHH", 12, width, len(rows), 1, bits)
    else:
        size = 124 if len(masks) == 16 else 40
        header = struct.pack("<IiiHHI", size, width, height, 1, bits, compression)
        header += struct.pack("<IiiII", len(pixels), 0, 0, colours, 0) + masks
        header = header.ljust(size, b"\0")
    start = 14 + len(header) + len(palette)
    return (
        b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + palette + pixels
    )


def element(tag: int, vr: bytes, value: bytes, order: str = "<", implicit: bool = False) -> bytes:
    """A data element of DICOM."""
    head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
    value += bytes(len(value) % 2)
    if implicit:
        return head + struct.pack(f"{order}I", len(value)) + value
    if vr in (b"OB", b"OW"):
        return head + vr + b"\0\0" + struct.pack(f"{order}I", len(value)) + value
    return head + vr + struct.pack(f"{order}H", len(value)) + value


def dicom(values: NDArray[np.uint16], order: str = "<", implicit: bool = False) -> bytes:
    """The data set of a DICOM image of 16 bits, without preamble or file meta information."""

    def short(tag: int, number: int) -> bytes:
        return element(tag, b"US", struct.pack(f"{order}H", number), order, implicit)

    height, width = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    return (
        element(0x00080060, b"CS", b"DX", order, implicit)
        + short(0x00280002, 1)
        + element(0x00280004, b"CS", b"MONOCHROME2 ", order, implicit)
        + short(0x00280010, height)
        + short(0x00280011, width)
        + short(0x00280100, 16)
        + short(0x00280101, 16)
        + short(0x00280102, 15)
        + short(0x00280103, 0)
        + element(0x7FE00010, b"OW", pixels, order, implicit)
    )


DICOM_MARK = bytes(128) + b"DICM"


def file_meta(syntax: bytes = b"1.2.840.10008.1.2.1") -> bytes:
    body = element(0x00020002, b"UI", b"1.2.840.10008.5.1.4.1.1.1.1")
    body += element(0x00020003, b"UI", b"1.2.3") + element(0x00020010, b"UI", syntax)
    return element(0x00020000, b"UL", struct.pack("<I", len(body))) + body
