"""Every format gives the values it should, and every broken file one kind of error."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squid_fast.data import ImageReadError, load_image, npy, pillow, read_image, readers
from squid_fast.data.readers import load_bytes
from tests.data.drawn import chunk

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

RAMP = (np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) * 257).astype(np.uint16)
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(path: Path, array: Any, mode: str | None = None, **options: Any) -> Path:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def png_of_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def bmp_of_size(width: int, height: int) -> bytes:
    """Of 24 bits; a multiple of 4 pixels wide, so that rows need no padding."""
    pixels = bytes(3 * width * height)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_keep_their_precision(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 1, 2, 255], [256, 257, 65534, 65535]], dtype=np.uint16)
    image = read_image(saved(tmp_path / f"a{suffix}", values))
    assert image.dtype == np.float32
    np.testing.assert_array_equal(np.round(image.astype(np.float64) * 65535), values)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".gif"])
def test_eight_bits_are_exact(tmp_path: Path, suffix: str) -> None:
    image = read_image(saved(tmp_path / f"a{suffix}", GREY))
    np.testing.assert_array_equal(np.round(image * 255), GREY)


def test_white_is_zero_and_twelve_bit_tiffs(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.tif", RAMP, tiffinfo={262: 0})
    with Image.open(path) as opened:
        assert opened.tag_v2[262] == 0, "Pillow did not write the tag; the test needs it"
    np.testing.assert_allclose(read_image(path), 1 - RAMP / 65535, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_wide_tiffs_are_stretched(tmp_path: Path, dtype: Any) -> None:
    values = np.array([[-100, 0], [100, 300]], dtype=dtype)
    image = read_image(saved(tmp_path / "a.tif", values))
    np.testing.assert_allclose(image, [[0, 0.25], [0.5, 1]], atol=1e-7)
    flat = read_image(saved(tmp_path / "b.tif", np.full((3, 2), 7, dtype=dtype)))
    np.testing.assert_array_equal(flat, np.zeros((3, 2)))
    if dtype == np.float32:
        with pytest.raises(ImageReadError, match="NaN"):
            read_image(saved(tmp_path / "c.tif", np.array([[0, np.nan]], dtype=dtype)))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_jpegs_of_every_mode_give_luminance(tmp_path: Path, mode: str) -> None:
    flat = Image.new("RGB", (24, 16), (200, 100, 50))
    image = read_image(saved(tmp_path / "a.jpg", flat, mode, quality=95))
    assert image.shape == (16, 24)
    expected = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
    np.testing.assert_allclose(image, expected, atol=3 / 255)


def test_transparency_lies_over_black(tmp_path: Path) -> None:
    rgba = np.full((1, 3, 4), 255, dtype=np.uint8)
    rgba[0, :, 3] = 255, 51, 0
    for mode in ("RGBA", "LA"):
        image = read_image(saved(tmp_path / "a.png", rgba, mode))
        np.testing.assert_allclose(image, [[1.0, 0.2, 0.0]], atol=1e-6)


def test_palettes_with_and_without_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 255, 255, 255, 255, 0, 0])
    image.putdata([0, 1, 2])
    opaque, clear = saved(tmp_path / "a.png", image), tmp_path / "b.png"
    np.testing.assert_allclose(read_image(opaque), [[0, 1, 76 / 255]], atol=1e-6)  # 0.299 * 255
    saved(clear, image, transparency=1)
    np.testing.assert_allclose(read_image(clear), [[0, 0, 76 / 255]], atol=1e-6)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".tif"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("L", (8, 6), level) for level in (255, 0, 128)]
    path = tmp_path / f"a{suffix}"
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read_image(path), np.ones((6, 8)))


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", GREY, format="PNG")
    np.testing.assert_array_equal(np.round(read_image(path) * 255), GREY)
    npy = tmp_path / "b.png"
    with open(npy, "wb") as file:
        np.save(file, GREY)
    np.testing.assert_array_equal(np.round(read_image(npy) * 255), GREY)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 255]], dtype=np.uint8), [[0, 1]]),
        (np.array([[0, 1, 65535]], dtype=np.uint16), [[0, 1 / 65535, 1]]),
        (np.array([[0, 65535]], dtype=">u2"), [[0, 1]]),
        (np.array([[True, False]]), [[1, 0]]),
        (np.array([[0.25, 0.5]], dtype=np.float64), [[0.25, 0.5]]),
        (np.array([[-1, 0, 3]], dtype=np.int64), [[0, 0.25, 1]]),
        (np.array([[-60000, 60000]], dtype=np.float16), [[0, 1]]),
        (np.array([[-1.5e308, 0, 1.5e308]]), [[0, 0.5, 1]]),
        (np.full((2, 2), 7.0), [[0, 0], [0, 0]]),
        (np.array([[[0.5], [1]], [[0], [0]]], dtype=np.float32), [[0.5, 1], [0, 0]]),
        (np.array([[[0.5, 1]]], dtype=np.float32), [[0.5, 1]]),
    ],
)
def test_npy(tmp_path: Path, array: Any, expected: Any) -> None:
    np.save(tmp_path / "a.npy", array)
    image = read_image(tmp_path / "a.npy")
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([[np.nan, 1]]), "NaN"),
        (np.array([[np.inf, 1]]), "NaN or infinite"),
        (np.array([[1j]]), "complex128"),
        (np.array([["a"]]), "<U1"),
        (np.zeros(5), r"shape \[5\]"),
        (np.zeros((2, 3, 3)), r"shape \[2, 3, 3\]"),
        (np.zeros((0, 3)), "no pixels|could not be decoded"),
        (np.array([[{}]]), "holds values of type object"),
    ],
)
def test_npy_that_is_no_image(tmp_path: Path, array: Any, reason: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ImageReadError, match=reason):
        read_image(tmp_path / "a.npy")


def test_too_many_pixels_are_refused_from_the_header(tmp_path: Path) -> None:
    png = tmp_path / "a.png"
    png.write_bytes(png_of_size(30_000, 30_000))
    with pytest.raises(ImageReadError, match="pixels; at most 100000000"):
        read_image(png)
    png.write_bytes(png_of_size(9_000, 12_000))  # below Pillow's own limit, above ours
    with (
        pytest.raises(ImageReadError, match="9000x12000 = 108000000"),
        pytest.warns(Image.DecompressionBombWarning),
    ):
        read_image(png)
    npy = tmp_path / "b.npy"
    with open(npy, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (30_000, 30_000)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 30_000 * 30_000)  # sparse
    with pytest.raises(ImageReadError, match="30000x30000"):
        read_image(npy)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.gif", "a.npy", "a.webp", "a.bmp"])
def test_truncated_files_are_errors(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    path = tmp_path / name
    np.save(path, noise) if name.endswith("npy") else saved(path, noise)
    data = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageReadError, match=name):
            read_image(path)


def test_what_is_no_image(tmp_path: Path) -> None:
    empty, text, folder = tmp_path / "e.png", tmp_path / "t.png", tmp_path / "x.png"
    empty.touch()
    text.write_text("not an image at all")
    folder.mkdir()
    link = tmp_path / "l.png"
    link.symlink_to(tmp_path / "gone.png")
    pipe = tmp_path / "p.png"
    os.mkfifo(pipe)
    for path, reason in (
        (empty, "is empty"),
        (text, "begins with b'not an i'"),
        (folder, "is a folder"),
        (link, "is a link to .*gone.png, which does not exist"),
        (pipe, "is a pipe"),
        (tmp_path / "none.png", "does not exist"),
        (Path("a\0b.png"), "cannot be reached"),
    ):
        with pytest.raises(ImageReadError, match=reason):
            read_image(path)


def test_errors_carry_their_kind_without_the_particulars(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    np.save(tmp_path / "shape.npy", np.zeros(5))
    np.save(other / "shape.npy", np.zeros((2, 3, 4)))
    for folder, text in ((tmp_path, b"not an image at all"), (other, b"{braces} are text")):
        (folder / "text.png").write_bytes(text)
        (folder / "link.png").symlink_to(folder / "gone.png")
        (folder / "cut.bmp").write_bytes(bmp_of_size(8, 8)[: -len(text)])
    kinds = {
        "none.png": "the file does not exist; give the path of an image file",
        "link.png": "the file is a link to …, which does not exist",
        "shape.npy": "the file has the shape …; [H, W], [1, H, W] and [H, W, 1] are read",
        "cut.bmp": (
            "the file could not be decoded as BMP, it is damaged or truncated (image file is "
            "truncated …)"
        ),
        "text.png": (
            "the file is not an image in a known format, it begins with …; PNG, JPEG, JPEG "
            "2000, TIFF, BMP, GIF, WebP, AVIF, PNM, NPY and DICOM are read, and the content "
            "decides, not the name"
        ),
    }
    for name, kind in kinds.items():
        messages = set()
        for folder in (tmp_path, other):
            with pytest.raises(ImageReadError, match=name) as raised:
                read_image(folder / name)
            assert raised.value.kind == kind
            assert pickle.loads(pickle.dumps(raised.value)).kind == kind
            messages.add(str(raised.value))
        assert len(messages) == 2
    plain = ImageReadError("3 of {4} images")
    assert str(plain) == plain.kind == "3 of {4} images"


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", GREY)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may read every file
        path.chmod(0)
        with pytest.raises(ImageReadError, match="permission denied"):
            read_image(path)
    monkeypatch.setattr(readers, "open", refuse, raising=False)
    with pytest.raises(ImageReadError, match="may not be read: permission denied"):
        read_image(path)


def test_load_image_squashes_and_averages(tmp_path: Path) -> None:
    values = np.zeros((20, 40), dtype=np.uint8)
    values[:, 20:] = 255
    image = load_image(saved(tmp_path / "a.png", values), 2)
    np.testing.assert_allclose(image[:, 0], image[0, 0])
    assert image[0, 0] < 0.2
    assert image[0, 1] > 0.8
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    grey = load_image(saved(tmp_path / "b.png", stripes), 8)
    np.testing.assert_allclose(grey, 0.5, atol=0.05)  # without antialiasing 0 or 1
    np.testing.assert_array_equal(load_image(saved(tmp_path / "c.png", GREY), 16) * 255, GREY)
    with pytest.raises(ValueError, match="size is 0"):
        load_image(tmp_path / "c.png", 0)


def test_bytes_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    image = load_bytes(path, 8)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.floor(np.load(path).astype(np.float64) * 255 + 0.5))
    np.testing.assert_array_equal(load_bytes(saved(tmp_path / "b.png", GREY), 16), GREY)


def radiograph(side: int) -> np.ndarray:
    """Soft shapes, edges, fine lines and the noise of a detector; uint8 [side + 5, side]."""
    y, x = np.mgrid[0 : side + 5, 0:side] / side
    body = 90 + 70 * np.sin(7 * x) * np.cos(5 * y) + 60 * ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.04)
    ribs = 20 * (np.sin(60 * y + 8 * x) > 0.8)
    noise = np.random.default_rng(0).normal(0, 3, body.shape)
    return np.clip(body + ribs + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("side", [128, 255, 256, 300, 511, 1000, 2048])
def test_jpegs_decoded_at_a_part_of_their_size(tmp_path: Path, side: int, colour: bool) -> None:
    path = saved(tmp_path / "a.jpg", radiograph(side), "RGB" if colour else None, quality=90)
    with Image.open(path) as opened:
        whole = opened.convert("L").convert("F").resize((64, 64), Image.Resampling.BILINEAR)
    difference = np.abs(load_image(path, 64) * 255 - np.asarray(whole))
    if side < 4 * 64:
        assert difference.max() < 1e-3
    else:
        assert 0 < difference.max() < 4  # grey levels, where the ribs end
        assert difference.mean() < 0.3


def test_a_jpeg_gives_the_luminance_that_it_stores(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(64, 192, (64, 64, 3), dtype=np.uint8)
    for name, options in (("a", {}), ("b", {"keep_rgb": True}), ("c", {"progressive": True})):
        path = saved(tmp_path / f"{name}.jpg", colours, quality=95, **options)
        with Image.open(path) as opened:
            expected = np.asarray(opened.convert("RGB").convert("L"), dtype=np.float64)
        assert np.abs(read_image(path) * 255.0 - expected).max() <= 1 + 1e-4


def changed_by(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Have ``change()`` happen between the header of an image and its pixels."""
    for module in (pillow, npy):
        check = module.check_pixels
        monkeypatch.setattr(module, "check_pixels", lambda *args, c=check: (c(*args), change()))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.npy"])
def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    np.save(path, GREY) if name.endswith("npy") else saved(path, GREY)
    size = path.stat().st_size
    read_image(path)
    changed_by(monkeypatch, lambda: os.utime(path, ns=(1, 1)))
    with pytest.raises(ImageReadError, match=f"changed while it was read .{size} bytes before"):
        read_image(path)
    changed_by(monkeypatch, lambda: os.truncate(path, 100))
    with pytest.raises(ImageReadError, match=rf"changed while it was read .*{name}|100 after"):
        read_image(path)


CUT_SHORT = """
import os, sys, time
from squid_fast.data import ImageReadError, npy, pillow, read_image

path, seconds = sys.argv[1], float(sys.argv[2])

def cut(*_):
    if seconds and os.fork():  # decoding has begun by then
        return
    time.sleep(seconds)
    os.truncate(path, 8192)
    if seconds:
        os._exit(0)

pillow.check_pixels = npy.check_pixels = cut
try:
    read_image(path)
except ImageReadError as error:
    print(error)
"""


@pytest.mark.parametrize(("name", "seconds"), [("a.npy", 0), ("a.tif", 0), ("a.tif", 0.05)])
def test_a_file_cut_short_does_not_kill_the_process(
    tmp_path: Path, name: str, seconds: float
) -> None:
    """It would (SIGBUS), were files mapped into memory."""
    noise = np.random.default_rng(0).integers(0, 256, (6000, 6000), dtype=np.uint8)
    path = tmp_path / name
    np.save(path, noise) if name.endswith("npy") else saved(path, noise, compression="tiff_lzw")
    command = [sys.executable, "-c", CUT_SHORT, path, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "was changed while it was read" in done.stdout
    assert "8192 after" in done.stdout


def test_npy_with_a_header_that_lies(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (9_000, 9_000)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(b"\0" * 1000)
    with pytest.raises(ImageReadError, match="damaged or truncated"):
        read_image(path)
    np.save(path, np.asfortranarray(GREY[:5]))
    np.testing.assert_array_equal(np.round(read_image(path) * 255), GREY[:5])


def test_running_out_of_memory_is_an_error_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.png", GREY)

    def swell(*_: Any) -> None:
        bytearray(1 << 62)

    monkeypatch.setattr(pillow, "_grey", swell)
    with pytest.raises(ImageReadError, match="takes more memory to decode than there is"):
        read_image(path)


def test_texts_that_inflate_are_not_inflated(tmp_path: Path) -> None:
    png = png_of_size(8, 8)
    text = zlib.compress(b"a" * (80 << 20), 9)
    for kind in (b"zTXt", b"iTXt"):
        body = b"k\0" + (b"\0" if kind == b"zTXt" else b"\1\0\0\0") + text
        path = tmp_path / "a.png"
        path.write_bytes(png[:33] + chunk(kind, body) + png[33:])
        with pytest.raises(ImageReadError, match="could not be decoded as PNG"):
            read_image(path)


def test_large_tiffs_are_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.tif", GREY)
    monkeypatch.setattr(pillow, "_MAX_TIFF_BYTES", 100)
    with pytest.raises(ImageReadError, match="TIFF files of at most 100 are read"):
        read_image(path)
