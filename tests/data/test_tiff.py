"""TIFF in the kinds that people have: the picture as it is stored, or what is not read."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squid_fast.data import ImageReadError, load_image, read_image
from tests.data.drawn import LUMA, packed, slope, stretch, tiff

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

GREY = slope(255).astype(np.uint8)
ORIENTATION = 274


def read(folder: Path, content: bytes) -> Any:
    path = folder / "a.tif"
    path.write_bytes(content)
    return read_image(path)


def tifffile_needed() -> None:
    pytest.importorskip("tifffile", reason="tifffile is not installed")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_ignored(tmp_path: Path, orientation: int) -> None:
    turned = {ORIENTATION: [orientation]}
    for dtype in (np.uint8, np.uint16, np.uint32, np.float32):
        values = slope(255).astype(dtype)
        want = stretch(values) if dtype in (np.uint32, np.float32) else values / np.iinfo(dtype).max
        np.testing.assert_allclose(read(tmp_path, tiff(values, tags=turned)), want, atol=1e-6)
    colour = np.stack([GREY, GREY, GREY], axis=-1)
    image = read(tmp_path, tiff(colour, photometric=2, tags=turned))
    np.testing.assert_allclose(image, GREY / 255, atol=1e-6)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        content = io.BytesIO()
        options = {"compression": compression, "tiffinfo": {ORIENTATION: orientation}}
        Image.fromarray(GREY).save(content, "TIFF", **options)
        np.testing.assert_allclose(read(tmp_path, content.getvalue()), GREY / 255, atol=1e-6)
    (tmp_path / "large.tif").write_bytes(tiff(np.repeat(GREY, 4, axis=0), tags=turned))
    rows = load_image(tmp_path / "large.tif", 12).mean(axis=1)
    assert (np.diff(rows) > 0).all(), "the picture was turned before it was resized"


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_ignored_in_exif_too(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = (
        {"lossless": True} if suffix == "WEBP" else {"quality": 100} if suffix == "JPEG" else {}
    )
    values = np.repeat(np.repeat(GREY, 8, axis=0), 8, axis=1)
    Image.fromarray(values).save(tmp_path / "a", suffix, exif=exif, **options)
    np.testing.assert_allclose(read_image(tmp_path / "a"), values / 255, atol=2 / 255)
    reduced = load_image(tmp_path / "a", 12)  # a JPEG is decoded at a part of its size
    assert (np.diff(reduced.mean(axis=1)) > 0).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    "dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]
)
def test_samples_of_every_type(tmp_path: Path, dtype: str, photometric: int, order: str) -> None:
    tifffile_needed()
    info: Any = np.finfo(dtype) if dtype[0] == "f" else np.iinfo(dtype)
    low, high = (-3.0, 5.0) if dtype[0] == "f" else (float(info.min), float(info.max))
    values = (slope(1) * 0.999 * (high - low) + low).astype(dtype)
    want = values / info.max if dtype in ("u1", "u2") else stretch(values)
    want = 1 - want if photometric == 0 else want
    for deflate in (False, True):
        image = read(tmp_path, tiff(values, photometric, order=order, deflate=deflate))
        np.testing.assert_allclose(image, want, atol=1e-6)


@pytest.mark.parametrize("photometric", [0, 1])
def test_what_pillow_reads_needs_no_tifffile(
    tmp_path: Path, photometric: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    values = slope(5).astype(np.float32)
    want = 1 - slope(1) if photometric == 0 else slope(1)
    np.testing.assert_allclose(read(tmp_path, tiff(values, photometric)), want, atol=1e-6)
    wide = (slope(1) * (2**32 - 1)).astype(np.uint32)  # above 2^31, too
    np.testing.assert_allclose(read(tmp_path, tiff(wide)), stretch(wide), atol=1e-6)
    with pytest.raises(
        ImageReadError, match=r"Pillow does not know: tifffile is not installed.*screen"
    ):
        read(tmp_path, tiff(slope(1)))


def test_a_constant_image_is_zero_in_either_interpretation(tmp_path: Path) -> None:
    for photometric in (0, 1):
        image = read(tmp_path, tiff(np.full((4, 5), 7, np.float32), photometric))
        np.testing.assert_array_equal(image, np.zeros((4, 5)))


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_reach_white(tmp_path: Path, bits: int, photometric: int) -> None:
    values = np.round(slope(2**bits - 1)).astype(np.uint8)
    want = values / (2**bits - 1)
    image = read(tmp_path, tiff(values, photometric, bits=bits))
    np.testing.assert_allclose(image, 1 - want if photometric == 0 else want, atol=1e-6)


def test_twelve_bits(tmp_path: Path) -> None:
    values = np.round(slope(4095)).astype(np.uint16)
    np.testing.assert_allclose(read(tmp_path, tiff(values, bits=12)), values / 4095, atol=1e-6)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_and_planes(tmp_path: Path, dtype: Any, deflate: bool, separate: bool) -> None:
    tifffile_needed()
    top = np.iinfo(dtype).max
    grey, alpha = slope(top).astype(dtype), slope(top).astype(dtype)[::-1]
    forms = {"deflate": deflate, "separate": separate}
    both = np.stack([grey, alpha], axis=-1)
    for meaning, want in ((0, grey / top), (1, grey / top), (2, grey / top * (alpha / top))):
        image = read(tmp_path, tiff(both, tags={338: [meaning]}, **forms))
        np.testing.assert_allclose(image, want, atol=1e-6)
    colour = np.stack([grey, grey // 2, alpha], axis=-1)
    image = read(tmp_path, tiff(colour, photometric=2, **forms))
    np.testing.assert_allclose(image, colour @ LUMA / top, atol=1.5 / 255)


def test_colour_maps(tmp_path: Path) -> None:
    shades = np.arange(256)[::-1]
    for unit in (257, 1):  # of 16 bits as the standard wants, and of 8
        colours = np.concatenate([shades, shades, shades]) * unit
        image = read(tmp_path, tiff(GREY, photometric=3, tags={320: colours.tolist()}))
        np.testing.assert_allclose(image, shades[GREY] / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tiff(np.zeros((3, 4), np.uint32), bits=24), "1 samples of 24 bits"),
        (tiff(GREY, photometric=None), "photometric interpretation missing"),
        (tiff(slope(65535).astype(np.uint16), photometric=3), "photometric interpretation 3"),
        (tiff(np.zeros((3, 4, 5), np.float16)), "5 samples of 16 bits, sample format 3"),
        (tiff(np.zeros((3, 4, 2), np.float32), tags={338: [2]}), "2 samples of 32 bits"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    tifffile_needed()
    with pytest.raises(
        ImageReadError, match=f"a.tif is a TIFF of a kind that is not read: .*{words}"
    ):
        read(tmp_path, content)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f8"])
def test_the_first_page_that_is_no_thumbnail(tmp_path: Path, dtype: str) -> None:
    tifffile_needed()
    import tifffile

    for reduced, first in (([1, 1, 0, 0], 2), ([0, 1], 0), ([1, 1], 0)):
        pages = [np.roll(GREY, 5 * index).astype(dtype) for index in range(len(reduced))]
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as writer:
            for index, page in enumerate(pages):
                turned = [(ORIENTATION, "H", 1, 1 + 5 * (index % 2))]
                writer.write(
                    page, photometric="minisblack", subfiletype=reduced[index], extratags=turned
                )
        want = pages[first] / (65535 if dtype == "u2" else 255)
        np.testing.assert_allclose(read(tmp_path, file.getvalue()), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_thumbnails_in_a_circle(tmp_path: Path, dtype: Any) -> None:
    tifffile_needed()
    content = tiff(GREY.astype(dtype), tags={254: [1]})
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    end = start + 2 + 12 * count
    circle = content[:end] + struct.pack("<I", start) + content[end + 4 :]
    np.testing.assert_allclose(read(tmp_path, circle), GREY / 255, atol=1e-6)


def test_webp_in_tiff(tmp_path: Path) -> None:
    """The libtiff of Pillow has no WebP, and takes it for damage."""
    tifffile_needed()
    pytest.importorskip("imagecodecs", reason="imagecodecs is not installed")
    import tifffile

    colours, file = np.stack([GREY, GREY // 2, GREY[::-1]], axis=-1), io.BytesIO()
    tifffile.imwrite(
        file, colours, photometric="rgb", compression="webp", compressionargs={"lossless": True}
    )
    np.testing.assert_allclose(read(tmp_path, file.getvalue()), colours @ LUMA / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tiff(np.round(slope(1023)).astype(np.uint16), bits=10), "1 samples of 10 bits"),
        (tiff(slope(1), tags={259: [34892]}), "samples of 64 bits, sample format 3.*n 34892"),
    ],
)
def test_what_takes_a_codec_that_is_not_there_is_named(
    tmp_path: Path, content: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile_needed()
    for name in [name for name in sys.modules if name.split(".")[0] in ("tifffile", "imagecodecs")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ImageReadError, match=f"of a kind that is not read: .*{words}"):
        read(tmp_path, content)


def test_truncated_samples_of_tifffile(tmp_path: Path) -> None:
    tifffile_needed()
    content = tiff(slope(1))
    for share in (0.3, 0.9):
        with pytest.raises(ImageReadError, match="damaged or truncated"):
            read(tmp_path, content[: int(share * len(content))])
    huge = tiff(slope(1), tags={256: [65535], 257: [65535]})
    with pytest.raises(ImageReadError, match="65535x65535 = 4294836225 pixels; at most"):
        read(tmp_path, huge)


def test_bits_are_packed_from_the_highest() -> None:
    """The helper itself, since truths hang on it."""
    assert packed(np.array([[1, 2, 3]]), 4) == [b"\x12\x30"]
