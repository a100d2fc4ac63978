"""Formats of image files, told by their first bytes: a name promises nothing."""

from __future__ import annotations

from pathlib import Path

DICOM_SUFFIXES = (".dcm", ".dicom")
_OTHERS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".npy")
IMAGE_SUFFIXES = _OTHERS + DICOM_SUFFIXES
"""Suffixes, in lower case, of the files that are taken for images without a look into them."""

KNOWN = "PNG, JPEG, TIFF, BMP, GIF, WebP, NPY and DICOM"
HEAD_BYTES = 132
_MAGIC = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "TIFF": (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"),
    "GIF": (b"GIF87a", b"GIF89a"),
    "NPY": (b"\x93NUMPY",),
    "BMP": (b"BM",),
}


def image_format(head: bytes) -> str | None:
    """The format of a file that begins with ``head``, its first ``HEAD_BYTES``; None if unknown.

    >>> image_format(b"GIF89a...")
    'GIF'
    """
    if head[128:132] == b"DICM":  # first: a DICOM preamble may imitate a TIFF
        return "DICOM"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    for name, beginnings in _MAGIC.items():
        if head.startswith(beginnings):
            return name
    return None


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
