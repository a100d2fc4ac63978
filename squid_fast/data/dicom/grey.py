"""What stored values of a DICOM image stand for: modality, values of interest, padding, polarity.

The sections are those of DICOM PS3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...utils.extras import require
from ..pixels import FloatImage, stretched
from .header import Header

_PADDING = {  # value and end of range, by VR of the pixels (C.7.5.1.1.2, C.7.6.24, C.7.6.25)
    "i": ("PixelPaddingValue", "PixelPaddingRangeLimit"),
    "f4": ("FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit"),
    "f8": ("DoubleFloatPixelPaddingValue", "DoubleFloatPixelPaddingRangeLimit"),
}


# X-ray angiography, fluoroscopy and biplane angiography. Their modality LUT leads to the intensity
# of the rays, and is not for display (C.8.7.1.1.2); windows are for the stored values.
_NOT_FOR_DISPLAY = tuple(f"1.2.840.10008.5.1.4.1.1.12.{number}" for number in (1, 2, 3))


def grey_levels(header: Header, stored: npt.NDArray[Any], raw: npt.NDArray[Any]) -> FloatImage:
    """Apply modality LUT, VOI LUT or window, and polarity (C.11.1, C.11.2, C.7.6.3.1.2).

    Args:
        stored: the values, [H, W].
        raw: the same before their unused bits were cleared, for values that mean padding.
    """
    inverted = header.text("PhotometricInterpretation") == "MONOCHROME1"
    values = _first_of(_modality, header, "PixelValueTransformationSequence", stored)
    if values is None:
        values = stored
    grey = _first_of(_of_interest, header, "FrameVOILUTSequence", values)
    if grey is not None:
        return np.float32(1) - grey if inverted else grey
    padding = _is_padding(header, stored, raw)
    if padding is not None and padding.any():
        if padding.all():
            return np.zeros(stored.shape, dtype=np.float32)
        values = np.where(padding, values[~padding][0], values)
    grey = stretched(values)
    if not grey.any():  # constant
        return grey
    if inverted:
        grey = np.float32(1) - grey
    if padding is not None:
        grey[padding] = 0  # it is no part of the image: black, as around it
    return grey


def colours_of_palette(header: Header, stored: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], int]:
    """Look up red, green and blue of each pixel, [H, W, 3], and the top of their range."""
    if header.raw("SegmentedRedPaletteColorLookupTableData"):
        colours = require("pydicom.pixels", "screen").apply_color_lut(stored, header.data_set)
        return colours[..., :3], np.iinfo(colours.dtype).max
    channels = [
        looked_up(
            header,
            stored,
            f"{colour}PaletteColorLookupTableDescriptor",
            f"{colour}PaletteColorLookupTableData",
        )
        for colour in ("Red", "Green", "Blue")
    ]
    return np.stack([channel for channel, _ in channels], axis=-1), max(top for _, top in channels)


def _first_of(
    apply: Callable[[Header, npt.NDArray[Any]], npt.NDArray[Any] | None],
    header: Header,
    macro: str,
    values: npt.NDArray[Any],
) -> npt.NDArray[Any] | None:
    """Apply what a macro says of frame 0 of an enhanced image (C.7.6.16), or of all, or the header.

    The first of them that says anything counts; None if none does.
    """
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in header.items(groups)[:1]:
            for item in group.items(macro)[:1]:
                if (result := apply(item, values)) is not None:
                    return result
    return apply(header, values)


def _modality(header: Header, stored: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Apply the modality LUT, or else slope and intercept; None if there is neither."""
    shown = header.text("SOPClassUID") not in _NOT_FOR_DISPLAY
    for item in header.items("ModalityLUTSequence") if shown else []:
        if item.raw("LUTDescriptor") or item.raw("LUTData"):
            return looked_up(item, stored)[0]
    slope, intercept = header.number("RescaleSlope"), header.number("RescaleIntercept")
    if slope is None and intercept is None:
        return None
    if slope == 0:
        raise header.error(f"{header.name('RescaleSlope')} is 0, which leaves nothing of the image")
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    return stored.astype(np.float64) * slope + intercept


def _of_interest(header: Header, values: npt.NDArray[Any]) -> FloatImage | None:
    """Apply the first VOI LUT or else the first window; None if there is neither."""
    for item in header.items("VOILUTSequence"):
        if item.raw("LUTDescriptor") or item.raw("LUTData"):
            entries, top = looked_up(item, values)
            return np.asarray(entries / top, dtype=np.float32)
    centers, widths = header.values("WindowCenter"), header.values("WindowWidth")
    for index in range(min(len(centers), len(widths))):
        center, width = header.number("WindowCenter", index), header.number("WindowWidth", index)
        if center is not None and width is not None:
            return _windowed(header, values, center, width)
    return None


def _windowed(header: Header, values: npt.NDArray[Any], center: float, width: float) -> FloatImage:
    """Scale the window to [0, 1] (C.11.2.1.2, C.11.2.1.3)."""
    function = header.text("VOILUTFunction") or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise header.error(
            f"{header.name('VOILUTFunction')} is {{function}}; LINEAR, LINEAR_EXACT and SIGMOID "
            "are read",
            function=function,
        )
    if width <= 0:
        raise header.error(
            f"{header.name('WindowWidth')} is {{width}}, and it has to be greater than 0",
            width=f"{width:g}",
        )
    x = values.astype(np.float64)
    if function == "SIGMOID":
        grey = 1 / (1 + np.exp(-4 * (x - center) / width))
    elif function == "LINEAR" and width == 1:
        grey = np.where(x > center - 0.5, 1.0, 0.0)
    elif function == "LINEAR" and width > 1:
        grey = np.clip((x - (center - 0.5)) / (width - 1) + 0.5, 0, 1)
    else:  # LINEAR has no narrower windows; whoever writes one means the exact function
        grey = np.clip((x - center) / width + 0.5, 0, 1)
    return np.asarray(grey, dtype=np.float32)


def looked_up(
    item: Header,
    values: npt.NDArray[Any],
    descriptor: str = "LUTDescriptor",
    data: str = "LUTData",
) -> tuple[npt.NDArray[Any], int]:
    """Map values through a lookup table; returns them and the top of the table's range.

    pydicom's own functions hold the index in the type of the table's entries, which overflows
    for 12-bit values and a table of 8-bit entries.
    """
    description = item.words(descriptor)
    if len(description) != 3 or not 1 <= description[2] <= 16:
        raise item.error(
            f"{item.name(descriptor)} is {{description}}; needed are the number of entries, the "
            "first value mapped, and 1 to 16 bits per entry",
            description=description or "missing",
        )
    count, first, bits = description
    table = _table(item, data, count or 2**16, bits)
    indices = values if values.dtype.kind in "iu" else np.floor(values)
    if first >= 2**15:  # writers disagree whether this is signed: the values tell (C.11.1.1)
        low, high = int(indices.min()), int(indices.max())
        signed, unsigned = first - 2**16, first
        reached = [start <= high and start + table.size > low for start in (signed, unsigned)]
        first = signed if (low < 0 if reached[0] == reached[1] else reached[0]) else unsigned
    indices = np.clip(indices.astype(np.int64) - first, 0, table.size - 1)
    return table[indices], _top(table, bits)


def _top(table: npt.NDArray[Any], bits: int) -> int:
    """The top of the range of a table that is described with so many bits per entry.

    Some writers give the size of an entry in place of the bits in use, or the other way round.
    Where most entries exceed the range, or all of them leave 15/16 of it unused, they tell it.
    """
    described, used = 2**bits - 1, 2 ** max(int(table.max()).bit_length(), 1) - 1
    exceeded = 2 * np.count_nonzero(table > described) > np.count_nonzero(table)
    return used if exceeded or 16 * used <= described else described


def _table(item: Header, data: str, count: int, bits: int) -> npt.NDArray[Any]:
    """The entries of a lookup table, at most ``count``: each a word, or bytes packed in words.

    They have no sign, whatever the VR says (C.11.1.1.1).
    """
    value, order = item.raw(data), "<" if item.little_endian else ">"
    if not value:
        raise item.error(f"{item.name(data)} is missing, and the lookup table has no entries")
    words = np.frombuffer(value, dtype=f"{order}u2", count=len(value) // 2)
    packed = bits <= 8 and (len(value) in (count, count + 1) or bool((words >> 8).any()))
    if not packed or len(value) >= 2 * count:
        return words[:count]
    if not item.little_endian and item.vr(data) != "OB":
        value = words.astype("<u2").tobytes()
    return np.frombuffer(value, dtype=np.uint8)[:count]


def _is_padding(
    header: Header, stored: npt.NDArray[Any], raw: npt.NDArray[Any]
) -> npt.NDArray[np.bool_] | None:
    """Which pixels only fill the rectangle (C.7.5.1.1.2); None if no value means that."""
    floats = stored.dtype.kind == "f"
    value, limit = _PADDING[f"f{stored.dtype.itemsize}" if floats else "i"]
    if not header.values(value):
        return None
    ends = [number for name in (value, limit) if (number := header.number(name)) is not None]
    if not floats:  # signed as the pixels are, whatever the VR says
        word = f"{stored.dtype.kind}{min(stored.dtype.itemsize, 2)}"
        ends = [int(np.array(int(end)).astype(word)) for end in ends]
    low, high = min(ends), max(ends)
    inside: npt.NDArray[np.bool_] = (stored >= low) & (stored <= high)
    if raw is not stored:
        inside |= (raw >= low) & (raw <= high)
    return inside
