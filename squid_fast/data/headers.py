"""What headers say that Pillow keeps to itself."""

from __future__ import annotations

from typing import BinaryIO

# The code stream of JPEG 2000 stands behind boxes with profiles, the frame of JPEG behind segments.
_SEARCHED, _SEGMENTS = 1 << 20, 10_000
_LOSSLESS, _HIERARCHICAL = (0xC3, 0xC7, 0xCB, 0xCF), (0xC5, 0xC6, 0xCD, 0xCE)
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # among the markers from 0xC0 to 0xCF
_JPEG_LS = 0xF7


def png_depth(file: BinaryIO) -> tuple[int, bool]:
    """The bits per channel of a PNG, and whether it is greyscale without an alpha channel."""
    file.seek(24)
    bits, colour = file.read(2)
    return bits, colour == 0


def bmp_bits(file: BinaryIO) -> int:
    """The bits per pixel of a BMP."""
    file.seek(14)
    header = file.read(16)
    start = 10 if header[0] == 12 else 14
    return int.from_bytes(header[start : start + 2], "little")


def jpeg_2000_bits(file: BinaryIO) -> int:
    """The bits of the first channel of a JPEG 2000 image; 8 if they are not found."""
    file.seek(0)
    head = file.read(_SEARCHED)
    start = head.find(b"\xff\x4f\xff\x51")
    return (head[start + 42] & 0x7F) + 1 if 0 <= start < len(head) - 42 else 8


def jpeg_variant(file: BinaryIO) -> str | None:
    """What kind of JPEG a file is, as words, if it is one that few decoders know."""
    start = 2
    for _ in range(_SEGMENTS):
        file.seek(start)
        head = file.read(10)
        if len(head) < 10 or head[0] != 0xFF:
            break
        marker, bits, channels = head[1], head[4], head[9]
        if marker == _JPEG_LS:
            return "a JPEG-LS image"
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            if marker in _LOSSLESS:
                return f"a lossless JPEG of {bits} bits"
            if marker in _HIERARCHICAL:
                return "a hierarchical JPEG"
            if bits != 8:
                return f"a JPEG of {bits} bits"
            return None if channels in (1, 3, 4) else f"a JPEG of {channels} channels"
        padding = marker == 0xFF
        start += 1 if padding else 2 + int.from_bytes(head[2:4], "big")
    return None
