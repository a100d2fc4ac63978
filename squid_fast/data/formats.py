"""Formats of image files, told by their first bytes: a name promises nothing."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

_DICOM = (".dcm", ".dicom", ".dicm", ".dic", ".dc3", ".ima", ".acr")
_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_JPEG_2000 = (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
_PNM = (".pgm", ".ppm", ".pbm", ".pnm")
_OTHERS = (".png", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".webp", ".avif", ".npy")
IMAGE_SUFFIXES = _OTHERS + _JPEG + _JPEG_2000 + _PNM + _DICOM
"""Suffixes, in lower case, of the files that are taken for images without a look into them."""

KNOWN = "PNG, JPEG, JPEG 2000, TIFF, BMP, GIF, WebP, AVIF, PNM, NPY and DICOM"
HEAD_BYTES = 1024
"""How much of a file tells its format, compressed by gzip or not."""

GZIP = b"\x1f\x8b\x08"
_MAGIC = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "TIFF": (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"),
    "GIF": (b"GIF87a", b"GIF89a"),
    "NPY": (b"\x93NUMPY",),
}
# The width and the height behind any comments. Text may begin with "P5", too.
_PNM_START = re.compile(rb"P[1-6]\s(?:\s|#[^\r\n]*[\r\n])*\d+\s(?:\s|#[^\r\n]*[\r\n])*\d+\s")
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # their sizes in bytes
_UNREAD = {
    "a PDF document": (b"%PDF",),
    "a ZIP archive (as NPZ files are)": (b"PK\x03\x04", b"PK\x05\x06"),
    "a file compressed by bzip2, xz or zstd": (b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"),
    "a gzip file inside another": (GZIP,),
    "an HDF5 file": (b"\x89HDF",),
    "an NRRD image": (b"NRRD",),
    "a MetaImage": (b"ObjectType =",),
    "a JPEG XL image": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "a Photoshop document": (b"8BPS",),
    "a web page, SVG or XML": (b"<svg", b"<?xml", b"<html", b"<HTML", b"<!DOCTYPE", b"<!doctype"),
    "a pointer of git-lfs in place of an image": (b"version https://git-lfs",),
}

_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR "
    b"US UT UV".split()
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # with four-byte lengths
_ELEMENTS = 4  # in a row make a file DICOM that lacks its mark


def image_format(head: bytes) -> str | None:
    """The format of a file that begins with ``head``, its first ``HEAD_BYTES``; None if unknown.

    Of a file compressed by gzip, the format of what is in it.

    >>> image_format(b"GIF89a...")
    'GIF'
    """
    head = unzipped(head)
    # First: a preamble may imitate a TIFF.
    if b"DICM" in (head[128:132], head[:4]) or _is_bare_dicom(head):
        return "DICOM"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if {b"avif", b"avis"} & _brands(head):
        return "AVIF"
    for name, beginnings in _MAGIC.items():
        if head.startswith(beginnings):
            return name
    if _PNM_START.match(head):
        return "PNM"
    return "BMP" if _is_bmp(head) else None


def is_image(path: Path) -> bool:
    """Whether a file begins as an image does; True if it cannot be opened, as nobody knows then.

    >>> _ = Path("scan").write_bytes(b"GIF89a...")
    >>> is_image(Path("scan"))
    True
    """
    try:
        with open(path, "rb") as file:
            return image_format(file.read(HEAD_BYTES)) is not None
    except OSError:
        return True


def unread_format(head: bytes) -> str | None:
    """What a file of no format that is read seems to be, as words for a message."""
    head = unzipped(head)
    if head[344:348] in (b"n+1\0", b"ni1\0"):
        return "a NIfTI volume"
    if {b"heic", b"heix", b"hevc", b"mif1", b"msf1"} & _brands(head):
        return "a HEIC image"
    for name, beginnings in _UNREAD.items():
        if head.startswith(beginnings):
            return name
    return None


def unzipped(head: bytes) -> bytes:
    """The beginning of a file as it was before gzip; other files' as it is."""
    if not head.startswith(GZIP):
        return head
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def _brands(head: bytes) -> set[bytes]:
    """The brands of a file in the container of HEIF, none of others."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12]} | {head[start : start + 4] for start in range(16, end, 4)}


def _is_bmp(head: bytes) -> bool:
    """A bitmap has a header of a known size and one plane; text may begin with "BM", too."""
    if head[:2] != b"BM" or len(head) < 28:
        return False
    size = int.from_bytes(head[14:18], "little")
    planes = 22 if size == 12 else 26
    return size in _BMP_HEADERS and head[planes : planes + 2] == b"\1\0"


def _is_bare_dicom(head: bytes) -> bool:
    """Whether data elements of DICOM or ACR-NEMA stand at the very beginning.

    The first belongs to group 2 or 8. Tags ascend, lengths are even, and either all or none of the
    elements have a value representation (VR).
    """
    start, last, explicit = 0, -1, head[4:6] in _VRS
    order = ">" if explicit and head[:2] == b"\0\x08" else "<"
    if order == "<" and head[:2] not in (b"\x02\0", b"\x08\0"):
        return False
    found = 0
    while found < _ELEMENTS:
        if len(head) < start + 12:
            return False
        group, element, length = struct.unpack_from(f"{order}HHI", head, start)
        vr = head[start + 4 : start + 6]
        value = start + 8
        if explicit and vr in _LONG_VRS:
            (length,) = struct.unpack_from(f"{order}I", head, value)
            value += 4
        elif explicit:
            (length,) = struct.unpack_from(f"{order}H", head, start + 6)
        tag = group << 16 | element
        if tag <= last or length % 2 or (vr in _VRS) != explicit:
            return False
        start, last = value + length, tag
        found += element > 0  # the length of a group is no evidence: small numbers look like one
    return True
