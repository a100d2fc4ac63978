"""Content decides what a file is, whatever its name, compressed by gzip or not."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squid_fast.data import ImageReadError, formats, read_image, readers
from squid_fast.data.formats import HEAD_BYTES, IMAGE_SUFFIXES, image_format, is_image
from tests.data.drawn import DICOM_MARK, bmp, dicom, element, file_meta, png, slope, stretch, tiff

pytest.importorskip("PIL.Image", reason="Pillow is not installed")
pytest.importorskip("pydicom", reason="pydicom is not installed")

GREY = np.round(slope(255)).astype(np.uint8)
WIDE = np.round(slope(65535)).astype(np.uint16)
LARGE = np.random.default_rng(0).integers(0, 65536, (64, 64), dtype=np.uint16)
DATA_SET = dicom(WIDE)


def saved_npy() -> bytes:
    file = io.BytesIO()
    np.save(file, WIDE)
    return file.getvalue()


# ACR-NEMA 2.0, of before DICOM: implicit VR, group lengths, and a code that recognises it.
ACR_NEMA = (
    element(0x00080000, b"UL", struct.pack("<I", 34), implicit=True)
    + element(0x00080001, b"UL", struct.pack("<I", 9999), implicit=True)
    + element(0x00080010, b"LO", b"ACR-NEMA 2.0", implicit=True)
    + dicom(WIDE, implicit=True)
)
FILES: dict[str, tuple[str, bytes, Any]] = {
    "PNG": ("PNG", png(GREY, 8), GREY / 255),
    "TIFF": ("TIFF", tiff(WIDE), WIDE / 65535),
    "BMP": (
        "BMP",
        bmp([bytes(np.repeat(row, 3)) for row in GREY], width=16, bits=24),
        GREY / 255,
    ),
    "NPY": ("NPY", saved_npy(), WIDE / 65535),
    "PGM of 8 bits": ("PNM", b"P5 16 12 255\n" + GREY.tobytes(), GREY / 255),
    "PGM of 16 bits": (
        "PNM",
        b"P5\n# made\n16 12\n65535\n" + WIDE.astype(">u2").tobytes(),
        WIDE / 65535,
    ),
    "PGM up to 4095": (
        "PNM",
        b"P5\r\n16 12\r\n# a note\n4095\n" + (WIDE >> 4).astype(">u2").tobytes(),
        (WIDE >> 4) / 4095,
    ),
    "PGM in digits": ("PNM", b"P2 3 2 5\n0 1 2\n3 4 5\n", [[0, 0.2, 0.4], [0.6, 0.8, 1]]),
    "PBM": ("PNM", b"P1\n3 1\n0 1 0\n", [[1, 0, 1]]),
    "PBM of bytes": ("PNM", b"P4\n8 1\n\x0f", [[1, 1, 1, 1, 0, 0, 0, 0]]),
    "PPM": ("PNM", b"P6 1 1 255\n\xff\xff\xff", [[1]]),
    "DICOM": ("DICOM", DICOM_MARK + file_meta() + DATA_SET, stretch(WIDE)),
    "DICOM that imitates a TIFF": (
        "DICOM",
        tiff(GREY)[:128] + b"DICM" + file_meta() + DATA_SET,
        stretch(WIDE),
    ),
    "DICOM without preamble": ("DICOM", b"DICM" + file_meta() + DATA_SET, stretch(WIDE)),
    "DICOM without preamble and mark": ("DICOM", file_meta() + DATA_SET, stretch(WIDE)),
    "DICOM data set": ("DICOM", DATA_SET, stretch(WIDE)),
    "DICOM data set, implicit": ("DICOM", dicom(WIDE, implicit=True), stretch(WIDE)),
    "DICOM data set, big-endian": ("DICOM", dicom(WIDE, order=">"), stretch(WIDE)),
    "ACR-NEMA": ("DICOM", ACR_NEMA, stretch(WIDE)),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["scan", "scan.dat", "IM.0001", "scan.dcm", "scan.png"])
@pytest.mark.parametrize("case", FILES)
def test_content_decides(tmp_path: Path, case: str, name: str, zipped: bool) -> None:
    expected, content, want = FILES[case]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert image_format(path.read_bytes()[:HEAD_BYTES]) == expected
    assert is_image(path)
    np.testing.assert_allclose(read_image(path), want, atol=2e-5)


UNKNOWN = {
    "P5 is the name of a projector": "it begins with b'P5 is th'",
    "P1\n# a heading\nand text": "not an image in a known format",
    "P2 9 lives, 12 months": "not an image in a known format",
    "BM stands for so many things that this line goes on for a while": "not an image in a known",
    "II*": "not an image in a known format",
    "\x08\0\x10\0\x20\0\0\0" + "\x40\0\x80\0" * 99: "not an image in a known format",
    "%PDF-1.7": "is a PDF document, which is not read; PNG, JPEG, .* and DICOM are",
    "PK\x03\x04" + "\0" * 26: "is a ZIP archive .as NPZ files are., which is not read",
    "\0\0\0\x18ftypheic\0\0\0\0mif1heic": "is a HEIC image, which is not read",
    "<!DOCTYPE html><title>404": "is a web page, SVG or XML",
    "version https://git-lfs.github.com/spec/v1\n": "is a pointer of git-lfs in place of an image",
    "\x5c\1\0\0" + "\0" * 340 + "n+1\0": "is a NIfTI volume",
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("text", UNKNOWN)
def test_other_content_is_refused_whatever_its_name(
    tmp_path: Path, text: str, zipped: bool
) -> None:
    content = text.encode("latin-1")
    for name in ("a", "a.png", "a.dcm"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if zipped else content)
        assert not is_image(path)
        with pytest.raises(ImageReadError, match=UNKNOWN[text]):
            read_image(path)


def test_noise_is_no_dicom() -> None:
    generator = np.random.default_rng(0)
    for start in (b"\x08\0", b"\x02\0", b"\0\x08"):
        type_of_words = ">i4" if start[0] == 0 else "<i4"
        for _ in range(2000):
            assert image_format(start + generator.bytes(HEAD_BYTES - 2)) is None
            small = generator.integers(0, 9, HEAD_BYTES // 4).astype(type_of_words)
            assert image_format(start + small.tobytes()[2:]) is None


def test_what_cannot_be_opened_may_be_an_image(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert not is_image(tmp_path / "empty")
    assert is_image(tmp_path / "none")
    assert is_image(tmp_path)


def test_suffixes_of_images() -> None:
    dicom_too = {".ima", ".dic", ".dc3", ".acr", ".dicm", ".dcm"}
    assert dicom_too | {".jfif", ".jpe", ".jp2", ".pgm", ".avif", ".png"} <= set(IMAGE_SUFFIXES)
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in IMAGE_SUFFIXES)


def test_gzip_that_is_damaged_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "a.dcm.gz", gzip.compress(DICOM_MARK + file_meta() + dicom(LARGE))
    for content, reason in (
        (whole[:-100], "a.dcm.gz could not be decompressed, it is damaged or truncated"),
        (whole[:-8] + bytes(8), "could not be decompressed"),  # the checksum
        (whole[:12], "is compressed by gzip and empty or damaged"),
        (gzip.compress(b""), "is compressed by gzip and empty or damaged"),
        (formats.GZIP + b"\xff" * 50, "is compressed by gzip and empty or damaged"),
        (gzip.compress(whole), "is a gzip file inside another, which is not read"),
    ):
        path.write_bytes(content)
        with pytest.raises(ImageReadError, match=reason):
            read_image(path)
    path.write_bytes(whole)
    size = len(gzip.decompress(whole))
    monkeypatch.setattr(readers, "_MAX_UNZIPPED", size)
    np.testing.assert_allclose(read_image(path), stretch(LARGE), atol=2e-5)
    monkeypatch.setattr(readers, "_MAX_UNZIPPED", size - 1)
    with pytest.raises(ImageReadError, match=f"decompresses to more than {size - 1} bytes"):
        read_image(path)


def test_gzip_with_a_long_name_and_several_members(tmp_path: Path) -> None:
    path, content = tmp_path / "a.gz", FILES["NPY"][1]
    with open(path, "wb") as file:
        for part in (content[:300], content[300:]):
            with gzip.GzipFile("n" * 255, "wb", fileobj=file) as member:
                member.write(part)
    assert is_image(path)
    np.testing.assert_allclose(read_image(path), WIDE / 65535, atol=1e-6)
