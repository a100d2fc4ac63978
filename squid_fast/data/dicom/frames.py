"""Compressed frames of DICOM images: each decoded as its codestream says that it is made."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...utils.extras import require
from ..pixels import ImageReadError
from .header import Header

Values = npt.NDArray[Any]

_RLE = "1.2.840.10008.1.2.5"
_JPEG_BASELINE, _JPEG_2000 = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90"
COMPRESSED = (_RLE,) + tuple(
    f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70, 80, 81, 90, 91, 201, 202, 203)
)
"""The transfer syntaxes that are decompressed."""

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_J2K = b"\xff\x4f\xff\x51"  # begins a codestream of JPEG 2000, with its size and precision
_MAX_BOXES = 4096  # bytes before it
_HIGH_THROUGHPUT = b"\xff\x50"  # then says that there is more than JPEG 2000 in it
_CODING_STYLE, _START_OF_TILE = b"\xff\x52", b"\xff\x90"  # the first says if RGB is transformed
# JPEG by the marker of the frame header.
_KINDS = {
    0xC0: "JPEG",
    0xC1: "JPEG",
    0xC2: "progressive JPEG",
    0xC3: "JPEG Lossless",
    0xF7: "JPEG-LS",
}
_OTHER_MARKERS = (0xC4, 0xC8, 0xCC)  # among 0xC0 to 0xCF, the frame headers


@dataclass(frozen=True)
class FrameFormat:
    """How the header describes a frame."""

    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int
    allocated: int
    stored: int
    signed: bool

    @property
    def count(self) -> int:
        """How many numbers there are, if colours are not subsampled."""
        return self.rows * self.columns * self.samples


@dataclass(frozen=True)
class _Codestream:
    """How a compressed frame describes itself."""

    kind: str
    precision: int
    rows: int
    columns: int
    samples: int
    colours: str = ""  # the photometric interpretation, where that is beyond doubt


def decompressed(data: bytes, header: Header, syntax: str, frame: FrameFormat) -> Values:
    """Decode a compressed frame to [H, W] or, in RGB, [H, W, 3].

    Raises:
        ImageReadError: it is damaged, contradicts the header, or takes a library that is not
            installed.
    """
    if syntax == _RLE:
        return _decode("RLE", header, lambda: by_pydicom(data, _RLE, frame))
    if not data.startswith(_SOI):  # without boxes of JP2, in which pydicom may search for ever
        data = data[max(0, data.find(_J2K, 0, _MAX_BOXES)) :]
    stream = _described(data, header)
    _check(stream, header, frame)
    if frame.samples == 3 and stream.colours:
        frame = replace(frame, photometric=stream.colours)
    if stream.kind == "JPEG 2000" and stream.precision <= (16 if frame.samples == 1 else 8):
        return _decode(stream.kind, header, lambda: by_pydicom(data, _JPEG_2000, frame))
    if stream.precision == 8 and stream.kind in ("JPEG", "progressive JPEG"):
        if frame.samples == 3:
            return _decode(stream.kind, header, lambda: _colours_by_pillow(data, stream, frame))
        return _decode(stream.kind, header, lambda: by_pydicom(data, _JPEG_BASELINE, frame, bits=8))
    values = _decode(stream.kind, header, lambda: _by_imagecodecs(data, stream, frame))
    return _as_header_says(values, stream, header, frame)


def by_pydicom(
    data: bytes, syntax: str, frame: FrameFormat, vr: str = "OW", bits: int | None = None
) -> Values:
    """Decode one frame, compressed or not, with all of its bits; colours become RGB."""
    plugin = ""
    if syntax in COMPRESSED:
        plugin = "pydicom" if syntax == _RLE else "pillow"  # whatever else is installed
        require("PIL.Image", "screen")
        data = require("pydicom.encaps", "screen").encapsulate([data], has_bot=False)
    decoder = require("pydicom.pixels", "screen").get_decoder(syntax)
    values, _ = decoder.as_array(
        data,
        index=0,
        validate=False,  # it warns of what has been looked at here
        view_only=True,  # spares a copy
        decoding_plugin=plugin,
        rows=frame.rows,
        columns=frame.columns,
        samples_per_pixel=frame.samples,
        planar_configuration=frame.planar,
        photometric_interpretation=frame.photometric,
        bits_allocated=bits or frame.allocated,
        bits_stored=bits or frame.allocated,
        pixel_representation=int(frame.signed),
        number_of_frames=1,
        pixel_keyword="PixelData",
        pixel_vr=vr,
    )
    return np.asarray(values, dtype=values.dtype.newbyteorder("="))


def _colours_by_pillow(data: bytes, stream: _Codestream, frame: FrameFormat) -> Values:
    """Decode a JPEG with 8 bits to RGB.

    pydicom converts the colours once more where an Adobe marker has made Pillow convert them.
    """
    with require("PIL.Image", "screen").open(io.BytesIO(data), formats=("JPEG",)) as image:
        if "adobe_transform" not in image.info and stream.colours != "RGB":
            image.draft("YCbCr", image.size)  # that is, as they are stored
        values = np.asarray(image)
        if image.mode == "RGB" or frame.photometric == "RGB":
            return values
    pixels = require("pydicom.pixels", "screen")
    return np.asarray(pixels.convert_color_space(values, "YBR_FULL", "RGB"))


def _decode(kind: str, header: Header, decoder: Any) -> Values:
    try:
        return np.asarray(decoder())
    except ImportError as error:
        raise header.error(f"it is compressed as {kind}, and {{error}}", error=error) from error
    except (ImageReadError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise header.error(f"its {kind} data is damaged or cut short") from error


def _described(data: bytes, header: Header) -> _Codestream:
    """Find how a JPEG or JPEG 2000 codestream describes itself."""
    try:
        if data.startswith(_SOI):
            return _described_jpeg(data)
        if not data.startswith(_J2K):
            raise ValueError(data[:4])
        width, height, left, top = struct.unpack_from(">4I", data, 8)
        samples, precision = struct.unpack_from(">HB", data, 40)
        after = 4 + struct.unpack_from(">H", data, 4)[0]
        kind = "HTJ2K" if data[after : after + 2] == _HIGH_THROUGHPUT else "JPEG 2000"
        while data[after : after + 2] not in (_CODING_STYLE, _START_OF_TILE):
            after += 2 + struct.unpack_from(">H", data, after + 2)[0]
        colours = "RGB" if data[after + 1] == _CODING_STYLE[1] and data[after + 8] else ""
        size = height - top, width - left
        return _Codestream(kind, (precision & 127) + 1, *size, samples, colours)
    except (ValueError, IndexError, struct.error) as error:
        raise header.error(
            "its compressed pixels are neither JPEG, JPEG-LS nor JPEG 2000, or damaged"
        ) from error


def _described_jpeg(data: bytes) -> _Codestream:
    position, jfif = 2, False
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in _OTHER_MARKERS):
            precision, rows, columns, samples = struct.unpack_from(">BHHB", data, position + 4)
            kind = _KINDS.get(marker, f"JPEG SOF{marker - 0xC0}")
            parts = data[position + 10 : position + 10 + 3 * samples]
            colours = ""
            if precision == 8 and kind in ("JPEG", "progressive JPEG"):
                if jfif or len(set(parts[1::3])) > 1:  # RGB is not subsampled
                    colours = "YBR_FULL"
                elif parts[::3] == b"RGB":
                    colours = "RGB"
            return _Codestream(kind, precision, rows, columns, samples, colours)
        if marker == 0xFF:  # a fill byte
            position += 1
        else:
            jfif = jfif or (marker == 0xE0 and data[position + 4 : position + 8] == b"JFIF")
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    raise ValueError(data[:position])


def _check(stream: _Codestream, header: Header, frame: FrameFormat) -> None:
    """Refuse a codestream that contradicts the header, before anything is decoded."""
    if " SOF" in stream.kind:
        raise header.error(
            "its compressed pixels are {kind}; baseline, extended, progressive and lossless JPEG "
            "with Huffman codes are read",
            kind=stream.kind,
        )
    if (stream.rows, stream.columns) != (frame.rows, frame.columns):
        raise header.error(
            f"its {stream.kind} data has {{columns}}x{{rows}} pixels, but "
            f"{header.name('Columns')} and {header.name('Rows')} say {{wanted}}",
            columns=stream.columns,
            rows=stream.rows,
            wanted=f"{frame.columns}x{frame.rows}",
        )
    if stream.samples != frame.samples:
        raise header.error(
            f"its {stream.kind} data has {{samples}} samples per pixel, but "
            f"{header.name('SamplesPerPixel')} is {{wanted}}",
            samples=stream.samples,
            wanted=frame.samples,
        )
    if stream.precision > frame.allocated or (stream.precision <= 8 < frame.stored):
        raise header.error(
            f"its {stream.kind} data has {{precision}} bits, but {header.name('BitsAllocated')} is "
            f"{{allocated}} and {header.name('BitsStored')} is {{stored}}",
            precision=stream.precision,
            allocated=frame.allocated,
            stored=frame.stored,
        )


def _by_imagecodecs(data: bytes, stream: _Codestream, frame: FrameFormat) -> Values:
    codecs = require("imagecodecs", "screen")
    if stream.kind in ("HTJ2K", "JPEG 2000"):
        values = codecs.jpeg2k_decode(data)
    elif not data.rstrip(b"\0\xff").endswith(_EOI):
        raise ValueError("no end of image")  # libjpeg would fill in the rest, CharLS search on
    elif stream.kind == "JPEG-LS":
        values = codecs.jpegls_decode(data)
    else:
        space = "RGB" if stream.samples == 3 else None  # which is to say, as they are stored
        values = codecs.jpeg8_decode(data, colorspace=space, outcolorspace=space)
    shape = (frame.rows, frame.columns) + (frame.samples,) * (frame.samples > 1)
    if values.shape == (frame.samples, *shape[:2]):
        values = np.moveaxis(values, 0, -1)
    if values.shape != shape:
        raise ValueError(values.shape)
    return np.ascontiguousarray(values)


def _as_header_says(
    values: Values, stream: _Codestream, header: Header, frame: FrameFormat
) -> Values:
    """Give values the type of the header; colours become RGB."""
    if frame.photometric in ("YBR_FULL", "YBR_FULL_422"):
        if values.dtype != np.uint8:
            raise header.error(
                f"{header.name('PhotometricInterpretation')} is {{photometric}}, which is read "
                "with 8 bits, and there are {precision}",
                photometric=frame.photometric,
                precision=stream.precision,
            )
        pixels = require("pydicom.pixels", "screen")
        return np.asarray(pixels.convert_color_space(values, "YBR_FULL", "RGB"))
    signs_unknown = frame.signed and values.dtype.kind == "u" and stream.precision < frame.stored
    # Only JPEG 2000 says whether it is signed. The highest bit of others may be the sign.
    if signs_unknown and (values >> (stream.precision - 1)).any():
        raise header.error(
            f"its {stream.kind} data has {{precision}} bits, but {header.name('BitsStored')} is "
            "{stored}, so that the signs are unknown",
            precision=stream.precision,
            stored=frame.stored,
        )
    size = frame.allocated // 8
    return values.astype(f"{values.dtype.kind}{size}").view(f"{'i' if frame.signed else 'u'}{size}")
