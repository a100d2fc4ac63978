"""Variants of PNG, BMP, JPEG and JPEG 2000: the true picture, or a sentence on what is not read."""

from __future__ import annotations

import io
import random
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squid_fast.data import ImageReadError, load_image, read_image
from tests.data.drawn import DICOM_MARK, LUMA, bmp, dicom, file_meta, packed, png, slope, tiff

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
FEATURES = pytest.importorskip("PIL.features")

GREY = np.round(slope(255)).astype(np.uint8)
COLOUR = np.stack([GREY, GREY // 2, GREY[::-1]], axis=-1)


def read(folder: Path, content: bytes) -> Any:
    path = folder / "a"
    path.write_bytes(content)
    return read_image(path)


def encoded(values: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_png_with_one_transparent_grey(tmp_path: Path, bits: int) -> None:
    top = 2**bits - 1
    values = np.round(slope(top)).astype(np.int64)
    for clear in {0, int(values[5, 5]), top}:
        content = png(values, bits, chunks={b"tRNS": struct.pack(">H", clear)})
        want = np.where(values == clear, 0, values / top)
        np.testing.assert_allclose(read(tmp_path, content), want, atol=1e-6)


def test_png_with_one_transparent_colour(tmp_path: Path) -> None:
    clear = struct.pack(">3H", *COLOUR[3, 3].tolist())
    want = np.where(np.equal(COLOUR, COLOUR[3, 3]).all(axis=-1), 0, COLOUR @ LUMA / 255)
    content = png(COLOUR, 8, colour=2, chunks={b"tRNS": clear})
    np.testing.assert_allclose(read(tmp_path, content), want, atol=1 / 255)
    with pytest.raises(
        ImageReadError, match="16-bit colour with a transparent colour, which is not"
    ):
        read(tmp_path, png(COLOUR.astype(int) * 257, 16, colour=2, chunks={b"tRNS": clear}))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_png_palettes(tmp_path: Path, bits: int) -> None:
    values = np.round(slope(2**bits - 1)).astype(np.int64)
    shades = np.linspace(255, 0, 2**bits).astype(np.uint8)
    chunks = {b"PLTE": np.repeat(shades, 3).tobytes()}
    image = read(tmp_path, png(values, bits, colour=3, chunks=chunks))
    np.testing.assert_allclose(image, shades[values] / 255, atol=1e-6)
    image = read(tmp_path, png(values, bits, colour=3, chunks=chunks | {b"tRNS": b"\x33"}))
    want = shades[values] / 255 * np.where(values == 0, 0.2, 1)
    np.testing.assert_allclose(image, want, atol=1e-6)
    with pytest.raises(ImageReadError, match="PNG without the palette"):
        read(tmp_path, png(values, bits, colour=3))


def test_png_with_alpha_of_16_bits(tmp_path: Path) -> None:
    grey, alpha = np.round(slope(65535)), np.round(slope(65535))[::-1]
    image = read(tmp_path, png(np.stack([grey, alpha], axis=-1), 16, colour=4))
    np.testing.assert_allclose(image, grey * alpha / 65535**2, atol=2 / 255)


def shades(count: int) -> bytes:
    return b"".join(bytes([int(shade)] * 3 + [0]) for shade in np.linspace(0, 255, count))


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bmp_palettes(tmp_path: Path, bits: int, top_down: bool) -> None:
    values = np.round(slope(2**bits - 1, width=13)).astype(np.int64)
    content = bmp(packed(values, bits), 13, bits, shades(2**bits), top_down=top_down)
    np.testing.assert_allclose(read(tmp_path, content), values / (2**bits - 1), atol=1e-6)


def test_bmp_of_os2_and_with_runs(tmp_path: Path) -> None:
    palette = b"".join(bytes([shade] * 3) for shade in range(256))
    rows = [row.tobytes() for row in GREY]
    np.testing.assert_allclose(read(tmp_path, bmp(rows, 16, 8, palette, core=True)), GREY / 255)
    runs = [b"".join(bytes([1, shade]) for shade in row) + b"\0\0" for row in rows]
    content = bmp([b"".join(runs[::-1]) + b"\0\1"], 16, 8, shades(256), compression=1)
    content = content[:22] + struct.pack("<i", 12) + content[26:]  # the height
    np.testing.assert_allclose(read(tmp_path, content), GREY / 255, atol=1e-6)


def test_bmp_whose_fourth_byte_is_unused(tmp_path: Path) -> None:
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    for alpha, share in ((0, 1), (51, 0.2)):
        pixels = np.concatenate([COLOUR[..., ::-1], np.full_like(GREY, alpha)[..., None]], axis=-1)
        rows = [row.tobytes() for row in pixels]
        image = read(tmp_path, bmp(rows, 16, 32, compression=3, masks=masks))
        np.testing.assert_allclose(image, COLOUR @ LUMA / 255 * share, atol=1 / 255)
        image = read(tmp_path, bmp(rows, 16, 32))
        np.testing.assert_allclose(image, COLOUR @ LUMA / 255, atol=1 / 255)


def test_bmp_with_fewer_colours_than_its_bits_allow(tmp_path: Path) -> None:
    values = GREY // 16
    rows = [row.tobytes() for row in values]
    image = read(tmp_path, bmp(rows, 16, 8, shades(16), colours=16))
    np.testing.assert_allclose(image, values / 15, atol=1e-6)
    two = bmp([row.tobytes() for row in values & 1], 16, 8, shades(2), colours=2)
    with pytest.raises(
        ImageReadError, match="BMP of 8 bits with a short grey palette, which is not"
    ):
        read(tmp_path, two)


@pytest.mark.parametrize(("bits", "wider"), [(1, 8), (4, 8), (8, 8), (12, 16), (16, 16)])
@pytest.mark.parametrize("bare", [False, True])
def test_jpeg_2000_of_every_depth(tmp_path: Path, bits: int, wider: int, bare: bool) -> None:
    """Pillow writes 8 and 16 bits; values are stored less the middle of their range."""
    values = np.round(slope(2**bits - 1, 32, 32))
    moved = values - 2 ** (bits - 1) + 2 ** (wider - 1)
    content = encoded(moved.astype(f"u{wider // 8}"), "JPEG2000", no_jp2=bare, irreversible=False)
    depth = content.index(b"\xff\x4f\xff\x51") + 42
    assert content[depth] == wider - 1
    content = content[:depth] + bytes([bits - 1]) + content[depth + 1 :]
    np.testing.assert_allclose(read(tmp_path, content), values / (2**bits - 1), atol=1e-6)


@pytest.mark.parametrize("bits", [9, 10, 12, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bare", [False, True])
def test_deep_jpeg_2000_in_colour(tmp_path: Path, bits: int, channels: int, bare: bool) -> None:
    """Its white stays white: Pillow makes it black."""
    codecs = pytest.importorskip("imagecodecs", reason="imagecodecs is not installed")
    values = np.round(slope(2**bits - 1, 32, 32 * channels)).astype(np.uint16)
    values = values.reshape((32, 32, channels) if channels > 1 else (32, 32))
    how: Any = {"level": 0, "reversible": True, "bitspersample": bits}
    content = codecs.jpeg2k_encode(values, codecformat="J2K" if bare else "JP2", **how)
    parts = np.atleast_3d(values / (2**bits - 1))
    want = parts[..., :3] @ LUMA if channels >= 3 else parts[..., 0]
    want = want * parts[..., -1] if channels in (2, 4) else want
    np.testing.assert_allclose(read(tmp_path, content), want, atol=1e-6)


def test_deep_jpeg_2000_without_imagecodecs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(COLOUR, "JPEG2000", irreversible=False)
    depth = content.index(b"\xff\x4f\xff\x51") + 42
    for channel in range(3):
        assert content[depth + 3 * channel] == 7
        at = depth + 3 * channel
        content = content[:at] + bytes([11]) + content[at + 1 :]
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    message = r"a JPEG 2000 image of 12 bits in RGB, .*: imagecodecs is not installed"
    with pytest.raises(ImageReadError, match=message):
        read(tmp_path, content)


def jpeg_with_frame(marker: int, bits: int = 8, channels: int = 1) -> bytes:
    content = encoded(GREY, "JPEG")
    frame = content.index(b"\xff\xc0")
    header = struct.pack(">BBHB", 0xFF, marker, 8 + 3 * channels, bits)
    parts = b"".join(bytes([index, 0x11, 0]) for index in range(channels))
    return (
        content[:frame]
        + header
        + content[frame + 5 : frame + 9]
        + bytes([channels])
        + parts
        + (content[frame + 13 :])
    )


def lossless_jpeg(values: Any) -> bytes:
    """Differences to the pixel on the left (above, in the first column), coded by their length."""
    values = values.astype(np.int64)
    before = np.full_like(values, 128)
    before[1:, 0], before[:, 1:] = values[:-1, 0], values[:, :-1]
    bits = ""
    for difference in (values - before).ravel().tolist():
        length = abs(difference).bit_length()
        bits += f"{length:04b}"  # nine codes of four bits
        if length:
            bits += format(difference + (2**length - 1 if difference < 0 else 0), f"0{length}b")
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    table = bytes([0, 0, 0, 0, 9] + [0] * 12) + bytes(range(9))
    frame = struct.pack(">BHHB3B", 8, *values.shape, 1, 1, 0x11, 0)
    segments = ((0xC3, frame), (0xC4, table), (0xDA, bytes([1, 1, 0, 1, 0, 0])))
    head = b"".join(
        struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments
    )
    return b"\xff\xd8" + head + data + b"\xff\xd9"


@pytest.mark.skipif(not FEATURES.check("libjpeg_turbo"), reason="Pillow has another libjpeg")
def test_lossless_jpeg_of_8_bits(tmp_path: Path) -> None:
    values = np.repeat(np.repeat(GREY, 8, axis=0), 8, axis=1)
    image = read(tmp_path, lossless_jpeg(values))
    np.testing.assert_allclose(image, values / 255, atol=1e-6)
    (tmp_path / "b").write_bytes(png(values, 8))
    half = load_image(tmp_path / "b", 12)
    np.testing.assert_allclose(load_image(tmp_path / "a", 12), half, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (jpeg_with_frame(0xC3, bits=12), "a lossless JPEG of 12 bits"),
        (jpeg_with_frame(0xC3, bits=16), "a lossless JPEG of 16 bits"),
        (jpeg_with_frame(0xF7), "a JPEG-LS image"),
        (jpeg_with_frame(0xC1, bits=12), "a JPEG of 12 bits"),
        (jpeg_with_frame(0xC0, channels=2), "a JPEG of 2 channels"),
        (jpeg_with_frame(0xC5), "a hierarchical JPEG"),
    ],
)
def test_other_jpegs_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(ImageReadError, match=f"a is {words}, which is not read; baseline and"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            png(GREY, 8, chunks={b"IHDR": b""}),
            "could not be decoded as PNG, it is damaged or truncated (Truncated IHDR chunk)",
        ),
        (png(GREY, 8)[:-40], "could not be decoded as PNG, it is damaged or truncated"),
        (
            png(GREY, 8).replace(b"IDAT", b"tEXt"),
            "could not be decoded as PNG, it is damaged or truncated (broken PNG file (bad header "
            "checksum in tEXt))",
        ),
        (
            bmp([b""] * 9, 2, 3),
            "uses a variant of BMP that is not read (Unsupported BMP pixel depth (3))",
        ),
        (b"P5 9 9 0\n", "could not be decoded as PNM, it is damaged or truncated (maxval must be"),
        (b"\x93NUMPY\x07\0v\0{}", "is in version 7 of NPY; 1 and 2 are read"),
    ],
)
def test_sentences(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(ImageReadError) as raised:
        read(tmp_path, content)
    assert str(raised.value).startswith(f"{tmp_path / 'a'} {sentence}")


def test_a_format_that_the_installed_pillow_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import features

    monkeypatch.setattr(features, "check", lambda codec: False)
    with pytest.raises(
        ImageReadError, match="is in WebP, which the installed Pillow cannot decode"
    ):
        read(tmp_path, encoded(GREY, "WEBP"))


def saved_npy() -> bytes:
    file = io.BytesIO()
    np.save(file, GREY)
    return file.getvalue()


SEEDS = {
    "PNG": lambda: png(GREY, 8, chunks={b"tRNS": b"\0\3"}),
    "PNG with a palette": lambda: png(GREY // 64, 2, colour=3, chunks={b"PLTE": bytes(range(12))}),
    "JPEG": lambda: encoded(COLOUR, "JPEG"),
    "lossless JPEG": lambda: jpeg_with_frame(0xC3),
    "TIFF": lambda: tiff(GREY, tags={274: [6]}),
    "TIFF of float64": lambda: tiff(slope(1)),
    "TIFF with LZW": lambda: encoded(GREY.astype(np.uint16), "TIFF", compression="tiff_lzw"),
    "BMP": lambda: bmp([row.tobytes() for row in GREY], 16, 8, shades(256)),
    "GIF": lambda: encoded(GREY, "GIF"),
    "WebP": lambda: encoded(COLOUR, "WEBP"),
    "JPEG 2000": lambda: encoded(GREY, "JPEG2000"),
    "PNM": lambda: b"P5\n# made\n16 12\n255\n" + GREY.tobytes(),
    "PNM in digits": lambda: b"P2 2 2 9\n# made\n1 2 3 4\n",
    "NPY": saved_npy,
    "DICOM": lambda: DICOM_MARK + file_meta() + dicom(GREY.astype(np.uint16)),
    "DICOM data set": lambda: dicom(GREY.astype(np.uint16), implicit=True),
}


@pytest.mark.parametrize("name", SEEDS)
def test_a_damaged_file_gives_an_image_or_a_sentence(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    whole = SEEDS[name]()
    chance = random.Random(name)
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 2, 5))):
            content[chance.randrange(min(len(content), 200))] = chance.choice((0, 1, 128, 255))
        if chance.random() < 0.3:
            del content[chance.randrange(len(content)) :]
        (tmp_path / "a").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn of what they repair
            for reader in (read_image, lambda path: load_image(path, 8)):
                try:
                    image = reader(tmp_path / "a")
                except ImageReadError as error:
                    refused += 1
                    sentence = str(error)
                    assert "Error" not in sentence
                    assert "object at" not in sentence
                    assert "\n" not in sentence
                else:
                    assert image.dtype == np.float32
                    assert image.min() >= 0
                    assert image.max() <= 1
    assert refused > 10, "hardly anything was damaged"
