"""Images that Pillow decodes, put right where it reads them otherwise than documented here."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..utils.extras import require
from .headers import bmp_bits, jpeg_2000_bits, jpeg_variant, png_depth
from .pixels import LUMA, MAX_PIXELS, FloatImage, ImageReadError, check_pixels, stretched
from .tiff import is_misread, load_as_stored, other_samples, seek_picture, wide_samples

_MAX_TIFF_BYTES = 2 << 30
_NAMES = {"JPEG 2000": "JPEG2000", "PNM": "PPM", "WebP": "WEBP"}  # where Pillow's differ
_CODECS = {"AVIF": "avif", "JPEG 2000": "jpg_2000", "WebP": "webp"}  # that Pillow may lack


def read_with_pillow(file: BinaryIO, path: Path, kind: str, size: int | None) -> FloatImage:
    """Read an image of a format of ``image_format`` as greyscale, [H, W] in [0, 1].

    With ``size``, it is [size, size] where resizing is cheaper before the last step than behind.

    Raises:
        ImageReadError: Pillow does not read this variant of the format.
        Exception: whatever Pillow raises on damaged files.
    """
    if kind == "TIFF":
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        if length > _MAX_TIFF_BYTES:
            raise ImageReadError(
                f"{{path}} has {{length}} bytes; TIFF files of at most {_MAX_TIFF_BYTES} are read",
                path=path,
                length=length,
            )
        # libtiff maps a file into memory: if the file becomes shorter, the process is killed.
        file = io.BytesIO(file.read())
    try:
        return _decoded(file, path, kind, size)
    except (OSError, SyntaxError) as error:
        if kind == "JPEG" and (variant := jpeg_variant(file)):
            message = (
                f"{{path}} is {variant}, which is not read; baseline and progressive JPEGs are"
            )
            raise ImageReadError(message, path=path) from error
        raise


def _decoded(file: BinaryIO, path: Path, kind: str, size: int | None) -> FloatImage:
    try:
        image = _opened(file, path, kind)
    except SyntaxError:
        if kind == "TIFF":
            return other_samples(file, path)
        raise
    with image:
        if kind == "TIFF":
            seek_picture(image)
        check_pixels(image.width, image.height, path)
        if kind == "TIFF":
            if is_misread(image):
                return other_samples(file, path)
            image, tags = load_as_stored(image)
            wide = wide_samples(image, tags)
            return _grey(image, kind, size, None) if wide is None else wide
        if kind == "PNG":
            _check_png(image, *png_depth(file), path)
        if kind == "BMP":
            _check_bmp(image, bmp_bits(file), path)
        bits = jpeg_2000_bits(file) if kind == "JPEG 2000" else 8
        if bits > 8 and image.mode in ("L", "LA", "RGB", "RGBA"):
            return _deep_jpeg_2000(file, image, bits, path)
        box = None
        if kind == "JPEG":
            wanted = None if size is None else (2 * size, 2 * size)
            # A lossless one is not decoded at a part of its size: old Pillows die of it.
            if size is not None and min(image.size) >= 4 * size and jpeg_variant(file):
                wanted = None
            scaled = image.draft("L", wanted)
            box = scaled and scaled[1]  # without the margin of sides that are no multiple of 8
        image.load()
        grey = _grey(image, kind, size, box)
    if bits == 8:
        return grey
    top = 16 if bits > 8 else 8  # bits that Pillow fills up with zeros from below
    return grey * np.float32((2**top - 1) / (2**top - 2 ** (top - bits)))


def _opened(file: BinaryIO, path: Path, kind: str) -> Any:
    pil = require("PIL.Image", "screen")
    if kind in _CODECS and not require("PIL.features", "screen").check(_CODECS[kind]):
        message = f"{{path}} is in {kind}, which the installed Pillow cannot decode; the newest can"
        raise ImageReadError(message, path=path)
    name = _NAMES.get(kind, kind)
    try:
        return pil.open(file, formats=(name,))
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise ImageReadError(
            f"{{path}} has too many pixels; at most {MAX_PIXELS} are read ({{error}})",
            path=path,
            error=error,
        ) from error
    except pil.UnidentifiedImageError:
        # Pillow keeps the reason to itself; its reader of the format does not.
        file.seek(0)
        return pil.OPEN[name][0](file, "")


def _deep_jpeg_2000(file: BinaryIO, image: Any, bits: int, path: Path) -> FloatImage:
    """Decode more than 8 bits where Pillow, as of version 13, rounds them to 8 and white to 0."""
    try:
        codecs = require("imagecodecs", "screen")
    except ImportError as error:
        raise ImageReadError(
            "{path} is a JPEG 2000 image of {bits} bits in {mode}, which Pillow does not read: "
            "{error}",
            path=path,
            bits=bits,
            mode=image.mode,
            error=error,
        ) from error
    file.seek(0)
    values = codecs.jpeg2k_decode(file.read()).reshape(image.height, image.width, -1)
    lowest = -(2 ** (bits - 1)) if values.dtype.kind == "i" else 0
    shares = (values.astype(np.float32) - np.float32(lowest)) / np.float32(2**bits - 1)
    grey = shares[..., :3] @ LUMA if image.mode.startswith("RGB") else shares[..., 0]
    return np.asarray(grey * shares[..., -1] if image.mode.endswith("A") else grey)


def _check_png(image: Any, bits: int, is_grey: bool, path: Path) -> None:
    """Correct and refuse what Pillow reads wrongly."""
    clear = image.info.get("transparency")
    if image.mode == "P" and image.palette is None:
        raise ImageReadError("{path} is a PNG without the palette that it needs", path=path)
    if clear is not None and bits == 16 and not is_grey:
        message = "{path} is a PNG of 16-bit colour with a transparent colour, which is not read"
        raise ImageReadError(message, path=path)
    if isinstance(clear, int) and is_grey and clear < 2**bits < 256:
        # Pixels of 1, 2 and 4 bits are widened to 8, but not the value of the transparent ones.
        image.info["transparency"] = clear * 255 // (2**bits - 1)


def _check_bmp(image: Any, bits: int, path: Path) -> None:
    """Refuse grey palettes for which Pillow takes wider or narrower pixels than there are."""
    if {"1": 1, "L": 8}.get(image.mode, bits) != bits:
        message = f"{{path}} is a BMP of {bits} bits with a short grey palette, which is not read"
        raise ImageReadError(message, path=path)


def _grey(
    image: Any, kind: str, size: int | None, box: tuple[float, float, float, float] | None
) -> FloatImage:
    """Reduce a decoded PIL image to luminance in [0, 1]: [H, W], or [size, size] if cheaper."""
    mode: str = image.mode
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PNM")):  # I where Pillow is old
        grey: FloatImage = np.asarray(image).astype(np.float32)
        if (clear := image.info.get("transparency")) is not None:
            grey[grey == clear] = 0
        return grey / np.float32(65535)
    if mode in ("F", "I"):
        return stretched(np.asarray(image))
    if mode == "La":  # multiplied by its alpha, which is what lying over black does
        return np.asarray(image)[..., 0] / np.float32(255)
    if mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        luminance: FloatImage = np.asarray(rgba.convert("L"), dtype=np.float32)
        opacity: FloatImage = np.asarray(rgba.getchannel("A"), dtype=np.float32)
        if kind == "BMP" and not opacity.any():
            return luminance / np.float32(255)  # a fourth byte that nobody filled in
        return np.asarray(luminance * opacity / (255 * 255), dtype=np.float32)
    if mode not in ("L", "1", "RGB"):
        image = image.convert("RGB")
    image = image.convert("L")
    if size is None or image.size == (size, size):
        values: FloatImage = np.asarray(image, dtype=np.float32)
    else:
        values = resized(image.convert("F"), size, box)
    return np.asarray(values / 255, dtype=np.float32)


def resized(
    image: Any, size: int, box: tuple[float, float, float, float] | None = None
) -> FloatImage:
    """Resize a PIL image of floats, or its part in ``box``, to [size, size]."""
    bilinear = require("PIL.Image", "screen").Resampling.BILINEAR  # antialiased in Pillow
    return np.asarray(image.resize((size, size), bilinear, box), dtype=np.float32)
