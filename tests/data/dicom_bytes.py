"""DICOM files written byte by byte, as pydicom would refuse to write many that people have."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
ITEM, END_OF_ITEMS = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"
UNDEFINED = 0xFFFFFFFF
LONG = ("OB", "OW", "OF", "OD", "SQ", "UN")
WORDS = {"US": "H", "SS": "h", "UL": "I", "FL": "f", "FD": "d"}

Tags = dict[int, tuple[str, Any]]
Kind = tuple[str, bool]
"""Byte order, and whether the VR is left out."""


def element(
    tag: int, vr: str, value: Any, kind: Kind = ("<", False), undefined: bool = False
) -> bytes:
    """One element. Numbers go by their VR; texts and bytes are padded to an even length."""
    order, implicit = kind
    if vr in WORDS and not isinstance(value, bytes):
        numbers = value if isinstance(value, (list, tuple)) else [value]
        value = b"".join(struct.pack(order + WORDS[vr], number) for number in numbers)
    elif isinstance(value, str):
        value = value.encode("latin-1")
    value += (b"\0" if vr in ("UI", "OB") else b" ") * (len(value) % 2)
    length = UNDEFINED if undefined else len(value)
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack(order + "I", length) + value
    if vr in LONG:
        return head + vr.encode() + b"\0\0" + struct.pack(order + "I", length) + value
    return head + vr.encode() + struct.pack(order + "H", length) + value


def sequence(*items: bytes) -> bytes:
    """The value of a sequence."""
    return b"".join(ITEM + struct.pack("<I", len(item)) + item for item in items)


def fragments(*data: bytes, table: bytes = b"") -> bytes:
    """The value of compressed pixels."""
    return sequence(table, *(piece + b"\0" * (len(piece) % 2) for piece in data)) + END_OF_ITEMS


def meta(syntax: str = EXPLICIT) -> bytes:
    """Preamble and file meta information."""
    body = element(0x00020010, "UI", syntax)
    return b"\0" * 128 + b"DICM" + element(0x00020000, "UL", len(body)) + body


def data_set(
    stored: Any,
    tags: Tags | None = None,
    kind: Kind = ("<", False),
    pixels: bytes | None = None,
    vr: str = "OW",
) -> bytes:
    """The elements of an image with ``stored`` values, [H, W] or [H, W, 3]."""
    stored = np.asarray(stored)
    bits = 8 * stored.dtype.itemsize
    if pixels is None:
        pixels = stored.astype(stored.dtype.newbyteorder(kind[0])).tobytes()
    described: Tags = {
        0x00080060: ("CS", "DX"),
        0x00280002: ("US", 3 if stored.ndim == 3 else 1),
        0x00280004: ("CS", "RGB" if stored.ndim == 3 else "MONOCHROME2"),
        0x00280010: ("US", stored.shape[0]),
        0x00280011: ("US", stored.shape[1]),
        0x00280100: ("US", bits),
        0x00280101: ("US", bits),
        0x00280102: ("US", bits - 1),
        0x00280103: ("US", int(stored.dtype.kind == "i")),
        0x7FE00010: (vr, pixels),
    }
    described.update(tags or {})
    compressed = pixels.startswith(ITEM)
    return b"".join(
        element(tag, *described[tag], kind, undefined=compressed and tag == 0x7FE00010)
        for tag in sorted(described)
        if described[tag][1] is not None
    )


def write(
    path: Path, stored: Any, tags: Tags | None = None, syntax: str = EXPLICIT, **how: Any
) -> Path:
    """Write an image. A tag with the value None is left out."""
    path.write_bytes(meta(syntax) + data_set(stored, tags, **how))
    return path
