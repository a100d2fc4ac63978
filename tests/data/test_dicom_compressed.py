"""Compressed DICOM images, from codestreams made here by hand or taken from the standards."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squid_fast.data import ImageReadError, read_image
from tests.data import dicom_bytes as made

pytest.importorskip("pydicom", minversion="3", reason="pydicom is not installed")
pytest.importorskip("imagecodecs", reason="imagecodecs is not installed")

JPEG = "1.2.840.10008.1.2.4."
ROOT = Path(__file__).parents[2]
V = np.random.default_rng(0).integers(0, 4096, (9, 7)).astype(np.uint16)
S = (V.astype(np.int16) - 2048).astype(np.int16)
TWELVE: made.Tags = {0x00280101: ("US", 12), 0x00280102: ("US", 11)}


def scaled(values: Any) -> Any:
    values = values.astype(np.float64)
    return (values - values.min()) / (values.max() - values.min())


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def huffman(differences: list[int], tail: str = "") -> bytes:
    """Code each difference by 5 bits for its length, its bits, and ``tail``."""
    bits = ""
    for value in differences:
        length = abs(value).bit_length()
        bits += f"{length:05b}"
        if 0 < length < 16:
            bits += f"{value if value > 0 else value + (1 << length) - 1:0{length}b}"
        bits += tail
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")


LENGTHS = bytes([0, 0, 0, 0, 17] + [0] * 11 + list(range(17)))  # a code of 5 bits for each


def jpeg_lossless(values: Any, precision: int) -> bytes:
    """ITU-T T.81, process 14: each value is predicted by its neighbour on the left."""
    planes = np.atleast_3d(np.asarray(values, dtype=np.int64))
    height, width, samples = planes.shape
    predicted = np.empty_like(planes)
    predicted[0, 0] = 1 << (precision - 1)
    predicted[1:, 0] = planes[:-1, 0]
    predicted[:, 1:] = planes[:, :-1]
    differences = (planes - predicted + 2**15) % 2**16 - 2**15
    parts = [bytes([index + 1, 0x11, 0]) for index in range(samples)]
    selectors = [bytes([index + 1, 0]) for index in range(samples)]
    frame = struct.pack(">BHHB", precision, height, width, samples) + b"".join(parts)
    scan = bytes([samples]) + b"".join(selectors) + bytes([1, 0, 0])
    return (
        b"\xff\xd8"
        + segment(0xC3, frame)
        + segment(0xC4, b"\0" + LENGTHS)
        + segment(0xDA, scan)
        + huffman(differences.ravel().tolist())
        + b"\xff\xd9"
    )


def jpeg_of_blocks(values: Any, precision: int) -> bytes:
    """ITU-T T.81, process 4: blocks of 8 by 8 pixels with one value each, which is then exact."""
    height, width = values.shape
    level = (values.astype(np.int64) - (1 << (precision - 1))).ravel()
    frame = struct.pack(">BHHB", precision, 8 * height, 8 * width, 1) + bytes([1, 0x11, 0])
    return (
        b"\xff\xd8"
        + segment(0xDB, b"\0" + bytes([8] * 64))
        + segment(0xC1, frame)
        + segment(0xC4, bytes([0, 0, 0, 0, 0, 16] + [0] * 11 + list(range(16))))
        + segment(0xC4, bytes([0x10, 1] + [0] * 15 + [0]))
        + segment(0xDA, bytes([1, 1, 0, 0, 63, 0]))
        + huffman(np.diff(level, prepend=0).tolist(), tail="0")
        + b"\xff\xd9"
    )


# The example of ITU-T T.87, annex H.3.
JPEG_LS = bytes.fromhex(
    "ffd8 fff7000b080004000401011100 ffda0008010100000000"
    "c000006c80208e01c00000574000006ee6000001bc18000005d800009160 ffd9"
)
JPEG_LS_VALUES = np.array(
    [[0, 0, 90, 74], [68, 50, 43, 205], [64, 145, 145, 145], [100, 145, 145, 145]], dtype=np.uint8
)
# OpenJPH's of np.arange(16).reshape(4, 4) * 273, and of the same less 2048.
HTJ2K = bytes.fromhex(
    "ff4fff5100294000000000040000000400000000000000000000000400000004000000000000000000010f01"
    "01ff50000800020000000aff52000c00020001000504044001ff5c0013208890909090909090909090909088"
    "8888ff64001700014f70656e4a50482056657220302e32362e332eff90000a0000000000410001ff93c00026"
    "ff7305077400000000c0001340001300cafc0287740030f303877400c0002780004e2040fc02027400866888"
    "00c35400ffd9"
)
HTJ2K_SIGNED = bytes.fromhex(
    "ff4fff5100294000000000040000000400000000000000000000000400000004000000000000000000018f01"
    "01ff50000800020000000aff52000c00020001000504044001ff5c0013208890909090909090909090909088"
    "8888ff64001700014f70656e4a50482056657220302e32362e332eff90000a0000000000410001ff93c00026"
    "ff7f02077400000000c0001340001300cafc0287740030f303877400c0002780004e2040fc02027400866888"
    "00c35400ffd9"
)
STEPS = (np.arange(16).reshape(4, 4) * 273).astype(np.uint16)


def write(path: Path, stored: Any, number: str, *streams: bytes, tags: Any = None) -> Path:
    pixels = made.fragments(*streams)
    return made.write(path, stored, tags, JPEG + number, pixels=pixels, vr="OB")


@pytest.mark.parametrize("number", ["57", "70"])
@pytest.mark.parametrize(
    ("stored", "coded", "precision", "tags"),
    [
        (V, V, 12, TWELVE),
        (V, V, 12, {}),
        (V, V << 4, 16, TWELVE | {0x00280102: ("US", 15)}),
        (V, V | 0x8000, 16, TWELVE),  # rubbish or an overlay above
        (S, S & 0x0FFF, 12, TWELVE),
        (S, S.view(np.uint16), 16, {}),
        ((V >> 4).astype(np.uint8), V >> 4, 8, {}),
        (V >> 4, V >> 4, 8, {0x00280101: ("US", 8), 0x00280102: ("US", 7)}),
    ],
)
def test_jpeg_lossless(
    tmp_path: Path, number: str, stored: Any, coded: Any, precision: int, tags: made.Tags
) -> None:
    stream = jpeg_lossless(coded, precision)
    image = read_image(write(tmp_path / "a.dcm", stored, number, stream, tags=tags))
    np.testing.assert_allclose(image, scaled(stored), rtol=0, atol=1e-7)


def test_jpeg_lossless_in_colour(tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    path = write(tmp_path / "a.dcm", colours, "70", jpeg_lossless(colours, 8))
    expected = colours @ np.array([0.299, 0.587, 0.114]) / 255
    np.testing.assert_allclose(read_image(path), expected, rtol=0, atol=1e-6)


COLOUR = (200, 60, 20)
JFIF = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize(
    ("marker", "is_rgb", "subsampled"),
    [
        (JFIF, False, False),
        (adobe(1), False, False),
        (JFIF + adobe(1), False, False),
        (adobe(0), True, False),
        (b"", True, False),  # its components are named R, G and B
        (b"", False, True),
    ],
    ids=["JFIF", "Adobe 1", "both", "Adobe 0", "R, G and B", "subsampled"],
)
def test_a_jpeg_knows_its_colours(
    tmp_path: Path, marker: bytes, is_rgb: bool, subsampled: bool, photometric: str
) -> None:
    from PIL import Image

    colours, file = np.full((16, 16, 3), COLOUR, dtype=np.uint8), io.BytesIO()
    how: Any = {"keep_rgb": True} if is_rgb else {"subsampling": 1 if subsampled else 0}
    Image.fromarray(colours).save(file, "JPEG", quality=100, **how)
    tables = file.getvalue()[file.getvalue().index(b"\xff\xdb") :]
    path = write(
        tmp_path / "a.dcm",
        colours,
        "50",
        b"\xff\xd8" + marker + tables,
        tags={0x00280004: ("CS", photometric)},
    )
    luma = np.dot(COLOUR, [0.299, 0.587, 0.114]) / 255
    np.testing.assert_allclose(read_image(path), luma, rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_RCT", "YBR_FULL", "YBR_FULL_422"])
def test_jpeg_2000_knows_that_it_transformed_its_colours(tmp_path: Path, photometric: str) -> None:
    from PIL import Image

    colours, file = np.full((8, 8, 3), COLOUR, dtype=np.uint8), io.BytesIO()
    how: Any = {"irreversible": False, "no_jp2": True, "mct": 1}
    Image.fromarray(colours).save(file, "JPEG2000", **how)
    tags: made.Tags = {0x00280004: ("CS", photometric)}
    path = write(tmp_path / "a.dcm", colours, "90", file.getvalue(), tags=tags)
    luma = np.dot(COLOUR, [0.299, 0.587, 0.114]) / 255
    np.testing.assert_allclose(read_image(path), luma, rtol=0, atol=1e-6)


def test_jpeg_of_12_bits(tmp_path: Path) -> None:
    blocks = np.array([[13, 4095, 0], [2048, 777, 1234]], dtype=np.uint16)
    stored = np.kron(blocks, np.ones((8, 8), dtype=np.uint16))
    path = write(tmp_path / "a.dcm", stored, "51", jpeg_of_blocks(blocks, 12), tags=TWELVE)
    np.testing.assert_allclose(read_image(path), stored / 4095, rtol=0, atol=1e-7)
    blocks //= 16
    stored = np.kron(blocks, np.ones((8, 8), dtype=np.uint16)).astype(np.uint8)
    path = write(tmp_path / "a.dcm", stored, "51", jpeg_of_blocks(blocks, 8))
    np.testing.assert_allclose(read_image(path), stored / 255, rtol=0, atol=1e-7)


@pytest.mark.parametrize("number", ["80", "81"])
def test_jpeg_ls(tmp_path: Path, number: str) -> None:
    path = write(tmp_path / "a.dcm", JPEG_LS_VALUES, number, JPEG_LS)
    np.testing.assert_allclose(read_image(path), JPEG_LS_VALUES / 205, rtol=0, atol=1e-7)


@pytest.mark.parametrize("number", ["201", "202", "203"])
def test_htj2k(tmp_path: Path, number: str) -> None:
    path = write(tmp_path / "a.dcm", STEPS, number, HTJ2K)
    np.testing.assert_allclose(read_image(path), STEPS / 4095, rtol=0, atol=1e-7)
    signed = STEPS.astype(np.int16) - np.int16(2048)
    path = write(tmp_path / "a.dcm", signed, number, HTJ2K_SIGNED)
    np.testing.assert_allclose(read_image(path), STEPS / 4095, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.uint32, np.int32])
def test_jpeg_2000_of_20_bits(tmp_path: Path, dtype: Any) -> None:
    import imagecodecs

    lowest = np.iinfo(dtype).min >> 12
    stored = (np.arange(64).reshape(8, 8) * (2**20 - 1) // 63 + lowest).astype(dtype)
    how: Any = {"level": 0, "reversible": True, "bitspersample": 20}
    stream = imagecodecs.jpeg2k_encode(stored, codecformat="J2K", **how)
    tags: made.Tags = {0x00280101: ("US", 20), 0x00280102: ("US", 19)}
    path = write(tmp_path / "a.dcm", stored, "90", stream, tags=tags)
    np.testing.assert_allclose(read_image(path), scaled(stored), rtol=0, atol=1e-7)


def test_jpeg_2000_with_an_overlay(tmp_path: Path) -> None:
    from PIL import Image

    overlaid = V.copy()
    overlaid[2:5] |= 0x8000
    coded = io.BytesIO()
    Image.fromarray(overlaid).save(coded, "JPEG2000", irreversible=False, no_jp2=True)
    for tags in (TWELVE, {0x60000100: ("US", 16), 0x60000102: ("US", 15)}):
        path = write(tmp_path / "a.dcm", V, "90", coded.getvalue(), tags=tags)
        np.testing.assert_allclose(read_image(path), scaled(V), rtol=0, atol=1e-7)


def test_fragments_and_frames(tmp_path: Path) -> None:
    first, second = jpeg_lossless(V, 12), jpeg_lossless(V[::-1], 12)
    half = len(first) // 4 * 2
    offset = 8 + len(first) + len(first) % 2
    two: made.Tags = TWELVE | {0x00280008: ("IS", "2")}
    table = struct.pack("<2I", 0, offset)
    for pixels, tags in (
        (made.fragments(first[:half], first[half:]), TWELVE),
        (made.fragments(first, second), two),
        (made.fragments(first, second), TWELVE),  # the count of frames is missing
        (made.fragments(first, second, table=table), two),
        (made.fragments(first + b"\xff"), TWELVE),  # padded with another byte than 0
        (made.fragments(first)[:-8], TWELVE),  # the end of the sequence is missing
    ):
        path = made.write(tmp_path / "a.dcm", V, tags, JPEG + "70", pixels=pixels, vr="OB")
        np.testing.assert_allclose(read_image(path), scaled(V), rtol=0, atol=1e-7)


def absurd(stream: bytes) -> bytes:
    start = stream.index(b"\xff\xc3") + 5
    return stream[:start] + b"\xff\xff\xff\xff" + stream[start + 4 :]


LOSSLESS = jpeg_lossless(V, 12)
BAD: dict[str, tuple[str, bytes, made.Tags, str]] = {
    "cut short": ("70", LOSSLESS[:80], {}, "its JPEG Lossless data is damaged or cut short"),
    "JPEG-LS cut short": (
        "80",
        JPEG_LS[:40],
        {0x00280010: ("US", 4), 0x00280011: ("US", 4), 0x00280101: ("US", 8)},
        "its JPEG-LS data is damaged or cut short",
    ),
    "empty": ("70", b"", {}, "neither JPEG, JPEG-LS nor JPEG 2000, or damaged"),
    "absurdly large": ("70", absurd(LOSSLESS), {}, "65535x65535 pixels, but Columns .* say 7x9"),
    "other rows": ("70", LOSSLESS, {0x00280010: ("US", 8)}, r"7x9 pixels, but .* say 7x8"),
    "other samples": (
        "70",
        LOSSLESS,
        {0x00280002: ("US", 3), 0x00280004: ("CS", "RGB")},
        r"has 1 samples per pixel, but Samples per Pixel \(0028,0002\) is 3",
    ),
    "8 bits instead of 12": (
        "70",
        jpeg_lossless(V >> 4, 8),
        {},
        r"8 bits, but Bits Allocated .* is 16 and Bits Stored \(0028,0101\) is 12",
    ),
    "a sign that may be in bit 11 or 15": (
        "70",
        LOSSLESS,
        {0x00280101: ("US", 16), 0x00280103: ("US", 1)},
        r"12 bits, but Bits Stored \(0028,0101\) is 16, so that the signs are unknown",
    ),
    "arithmetic codes": (
        "70",
        LOSSLESS.replace(b"\xff\xc3", b"\xff\xcb"),
        {},
        "its compressed pixels are JPEG SOF11; baseline",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_named(tmp_path: Path, case: str) -> None:
    number, stream, tags, reason = BAD[case]
    with pytest.raises(ImageReadError, match=reason):
        read_image(write(tmp_path / "a.dcm", V, number, stream, tags=TWELVE | tags))


def test_pixels_that_are_not_compressed(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.dcm", V, TWELVE, JPEG + "70")
    with pytest.raises(
        ImageReadError, match=r"its transfer syntax is JPEG Lossless.* not compress"
    ):
        read_image(path)


def test_a_box_without_length_ends(tmp_path: Path) -> None:
    """pydicom would look for the box behind it for ever."""
    boxes = b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\0jp2h"
    with pytest.raises(ImageReadError, match="neither JPEG, JPEG-LS nor JPEG 2000"):
        read_image(write(tmp_path / "a.dcm", STEPS, "90", boxes))
    path = write(tmp_path / "a.dcm", STEPS, "90", boxes + HTJ2K)
    np.testing.assert_allclose(read_image(path), STEPS / 4095, rtol=0, atol=1e-7)


def test_without_imagecodecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    path = write(tmp_path / "a.dcm", V, "70", LOSSLESS, tags=TWELVE)
    message = r'it is compressed as JPEG Lossless, and .* pip install "squid-fast\[screen\]"'
    with pytest.raises(ImageReadError, match=message):
        read_image(path)


DAMAGED = """
import sys, warnings
from squid_fast.data import ImageReadError, read_image

warnings.simplefilter("ignore")
for path in sys.argv[1:]:
    try:
        read_image(path)
    except ImageReadError:
        pass
print("whole")
"""


def test_damaged_streams_raise_nothing_else_and_crash_nothing(tmp_path: Path) -> None:
    rng, paths = random.Random(0), []
    samples = [
        made.meta(JPEG + number) + made.data_set(stored, tags, pixels=made.fragments(stream))
        for number, stored, stream, tags in (
            ("70", V, LOSSLESS, TWELVE),
            ("51", STEPS.repeat(8, 0).repeat(8, 1), jpeg_of_blocks(STEPS, 12), TWELVE),
            ("80", JPEG_LS_VALUES, JPEG_LS, None),
            ("201", STEPS, HTJ2K, None),
        )
    ]
    for index in range(200):
        data = bytearray(rng.choice(samples))
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(132, len(data))] = rng.choice((0, 255, rng.randrange(256)))
        paths.append(tmp_path / f"{index}.dcm")
        paths[-1].write_bytes(data if rng.random() < 0.8 else data[: rng.randrange(132, len(data))])
    command = [sys.executable, "-c", DAMAGED, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole\n", ""), done.stderr[-2000:]
