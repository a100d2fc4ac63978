"""The stored values of a DICOM image: its first frame, and the bits that count."""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...utils.extras import require
from .frames import COMPRESSED, FrameFormat, by_pydicom, decompressed
from .header import Header

Values = npt.NDArray[Any]

_UNDEFINED = 0xFFFFFFFF  # the length of an element that ends with a delimiter
_FLOATS = {0x7FE00008: "f4", 0x7FE00009: "f8"}
_LITTLE_ENDIAN, _BIG_ENDIAN = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_UNCOMPRESSED = (_LITTLE_ENDIAN, _BIG_ENDIAN, "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_GREYS = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")


def read_frame(file: BinaryIO, header: Header, syntax: str) -> tuple[Values, Values]:
    """Read frame 0: [H, W], or [H, W, 3] in RGB.

    Args:
        file: a file at the element with the pixels.
        syntax: the transfer syntax that the file claims to have; may be empty.

    Returns:
        The stored values, and the same before unused bits were cleared.

    Raises:
        ImageReadError: header and pixels contradict each other, or the kind is not read.
    """
    tag, vr, length = _pixel_element(file, header)
    if tag in _FLOATS:
        return _floats(file, header, tag, length)
    if syntax and syntax not in _UNCOMPRESSED + COMPRESSED:
        raise header.error(
            "its transfer syntax is {name}, which is not read; convert it to Explicit VR Little "
            "Endian",
            name=_syntax_name(syntax),
        )
    frame = _format(header)
    compressed = length == _UNDEFINED or (syntax in COMPRESSED and _at_item(file))
    if syntax and compressed != (syntax in COMPRESSED):
        raise header.error(
            "its transfer syntax is {name}, but Pixel Data (7FE0,0010) is "
            f"{'compressed' if compressed else 'not compressed'}",
            name=_syntax_name(syntax),
        )
    if compressed:
        decoded = decompressed(_first_compressed(file, header), header, syntax, frame)
    else:
        decoded = _uncompressed(file, header, frame, vr, length)
    return _used_bits(header, frame, decoded), decoded


def _syntax_name(syntax: str) -> str:
    name = require("pydicom.uid", "screen").UID(syntax).name
    return syntax if name == syntax else f"{name} ({syntax})"


def _pixel_element(file: BinaryIO, header: Header) -> tuple[int, str, int]:
    """Read tag, VR (empty if it is left out) and length of the element with the pixels."""
    order = "<" if header.little_endian else ">"
    start = file.read(8)
    if len(start) < 8:
        raise header.error("Pixel Data (7FE0,0010) is missing; it may be cut short")
    group, element, vr, length = struct.unpack(f"{order}HH2sH", start)
    if header.implicit or not vr.isalpha():
        vr, length = b"", struct.unpack(f"{order}I", start[4:])[0]
    elif vr not in (b"US", b"SS"):
        (length,) = struct.unpack(f"{order}I", file.read(4).ljust(4, b"\0"))
    return group << 16 | element, vr.decode(), length


def _at_item(file: BinaryIO) -> bool:
    start = file.read(4)
    file.seek(-len(start), os.SEEK_CUR)
    return start == b"\xfe\xff\x00\xe0"


def _format(header: Header) -> FrameFormat:
    photometric = header.text("PhotometricInterpretation")
    samples = header.integer("SamplesPerPixel")
    if header.text("RecognitionCode").startswith("ACR-NEMA"):  # which knew greyscale alone
        photometric, samples = photometric or "MONOCHROME2", samples or 1
    if not photometric:
        raise header.error(f"{header.name('PhotometricInterpretation')} is missing")
    if photometric not in _GREYS + _COLOURS:
        raise header.error(
            f"{header.name('PhotometricInterpretation')} is {{photometric}}; "
            f"{', '.join(_GREYS + _COLOURS)} are read",
            photometric=photometric,
        )
    wanted = 3 if photometric in _COLOURS else 1
    if samples is None:
        samples = header.needed("SamplesPerPixel")
    if samples != wanted:
        raise header.error(
            f"{header.name('SamplesPerPixel')} is {{samples}}, but "
            f"{header.name('PhotometricInterpretation')} is {{photometric}}, which has {{wanted}}",
            samples=samples,
            photometric=photometric,
            wanted=wanted,
        )
    allocated, stored = header.needed("BitsAllocated"), header.needed("BitsStored")
    if allocated not in (1, 8, 16, 32, 64):
        raise header.error(
            f"{header.name('BitsAllocated')} is {{allocated}}; 1, 8, 16, 32 and 64 are read",
            allocated=allocated,
        )
    if not 1 <= stored <= allocated:
        raise header.error(
            f"{header.name('BitsStored')} is {{stored}}, and it has to be between 1 and "
            f"{header.name('BitsAllocated')}, which is {{allocated}}",
            stored=stored,
            allocated=allocated,
        )
    signed = header.needed("PixelRepresentation")
    if signed not in (0, 1):
        raise header.error(
            f"{header.name('PixelRepresentation')} is {{signed}}; 0 and 1 are read", signed=signed
        )
    return FrameFormat(
        rows=header.needed("Rows"),
        columns=header.needed("Columns"),
        samples=samples,
        photometric=photometric,
        planar=header.integer("PlanarConfiguration") or 0,
        allocated=allocated,
        stored=stored,
        signed=signed == 1 and photometric not in _COLOURS,  # which have no sign (C.7.6.3.1.2)
    )


def _floats(file: BinaryIO, header: Header, tag: int, length: int) -> tuple[Values, Values]:
    dtype = np.dtype(_FLOATS[tag]).newbyteorder("<" if header.little_endian else ">")
    shape = header.needed("Rows"), header.needed("Columns")
    data = _read(file, header, length, shape[0] * shape[1] * dtype.itemsize)
    values = np.frombuffer(data, dtype=dtype).reshape(shape).astype(_FLOATS[tag])
    return values, values


def _read(file: BinaryIO, header: Header, length: int, needed: int) -> bytes:
    """Read the bytes of a frame from an element that claims to have ``length``."""
    start = file.tell()
    there = min(length, file.seek(0, os.SEEK_END) - start)
    file.seek(start)
    if there < needed:
        raise header.error(
            "its pixels have {there} bytes, and {needed} are expected; it is cut short, or its "
            "header is wrong",
            there=there,
            needed=needed,
        )
    return file.read(needed)


def _uncompressed(
    file: BinaryIO, header: Header, frame: FrameFormat, vr: str, length: int
) -> Values:
    if frame.samples > 1 and header.integer("PlanarConfiguration") not in (0, 1):
        raise header.error(
            f"{header.name('PlanarConfiguration')} is {{planar}}; 0 and 1 are read",
            planar=header.text("PlanarConfiguration") or "missing",
        )
    whole = (frame.count * frame.allocated + 7) // 8
    needed = whole
    if frame.photometric == "YBR_FULL_422":
        if length >= whole * (header.integer("NumberOfFrames") or 1):
            raise header.error(
                f"{header.name('PhotometricInterpretation')} is YBR_FULL_422, but its colours are "
                "not subsampled, and may be YBR_FULL or RGB"
            )
        needed = whole // 3 * 2
    data = _read(file, header, length, needed)
    if not header.little_endian and needed % 2:
        data += file.read(1)  # the last byte, where bytes of words are swapped
    syntax = _LITTLE_ENDIAN if header.little_endian else _BIG_ENDIAN
    return by_pydicom(data, syntax, frame, vr or "OW")


def _first_compressed(file: BinaryIO, header: Header) -> bytes:
    """Put the fragments of frame 0 together."""
    encaps = require("pydicom.encaps", "screen")
    frames = header.integer("NumberOfFrames") or 1
    tables = header.raw("ExtendedOffsetTable"), header.raw("ExtendedOffsetTableLengths")
    try:
        if frames > 1:
            offsets = tables if all(tables) else None
            return bytes(
                encaps.get_frame(file, 0, number_of_frames=frames, extended_offsets=offsets)
            )
        encaps.parse_basic_offsets(file)
        return b"".join(encaps.generate_fragments(file))
    except (ValueError, OSError, struct.error) as error:
        raise header.error("the fragments of its compressed pixels are damaged") from error


def _used_bits(header: Header, frame: FrameFormat, decoded: Values) -> Values:
    """Take the bits that hold the value out of each number (PS3.5 8.1.1).

    Many headers name a wrong High Bit, so that the pixels decide. Where it says that values begin
    above bit 0, nothing may lie below them; otherwise they begin at bit 0, and nothing may lie
    above Bits Stored.
    """
    if frame.allocated == 1:
        return decoded
    allocated, stored = 8 * decoded.dtype.itemsize, frame.stored
    bits = decoded.view(f"u{decoded.dtype.itemsize}")
    high = header.integer("HighBit")
    top = stored - 1 if high is None or high >= allocated else high
    if overlays := _overlay_bits(header, top, stored):
        bits = bits & bits.dtype.type((2**allocated - 1) & ~overlays)
    values = _lowest(bits, stored, decoded.dtype)
    shift = top + 1 - stored
    if shift == 0:
        return values
    if shift > 0:
        if not (bits & bits.dtype.type(2**shift - 1)).any():
            return _lowest(bits >> bits.dtype.type(shift), stored, decoded.dtype)
        known = (values == bits.view(decoded.dtype)).all()
    else:  # a highest bit that is set may be a sign
        known = not frame.signed or int(bits.max()).bit_length() != top + 1
    if known:
        return values
    raise header.error(
        f"{header.name('HighBit')} is {{high}} and {header.name('BitsStored')} is {{stored}}, and "
        "the pixels do not show which of them is right",
        high=high,
        stored=stored,
    )


def _lowest(bits: Values, count: int, dtype: np.dtype[Any]) -> Values:
    """Keep the lowest bits as a number; the highest of them is the sign of a signed one."""
    shift = 8 * dtype.itemsize - count
    if shift == 0:
        return bits.view(dtype)
    if dtype.kind == "u":
        return bits & bits.dtype.type(2**count - 1)
    return (bits << bits.dtype.type(shift)).view(dtype) >> dtype.type(shift)


def _overlay_bits(header: Header, top: int, stored: int) -> int:
    """A mask of the bits that hold overlays, as they could until 2004 (PS3.3 C.9.2).

    The value has ``stored`` bits, ``top`` is the highest. A bit among them is taken for an overlay
    only if none of the value lies above it.
    """
    positions = set()
    for group in range(0x60000000, 0x60200000, 0x20000):
        embedded = not header.raw(group | 0x3000) and header.words(group | 0x0100) != [1]
        if embedded:
            positions.update(header.words(group | 0x0102)[:1])
    below = top
    while below in positions:
        below -= 1
    return sum(1 << bit for bit in positions if not top - stored < bit <= below)
