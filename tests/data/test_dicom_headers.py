"""DICOM headers that contradict the pixels, are empty in part, or cannot be read."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squid_fast.data import ImageReadError, read_image
from tests.data import dicom_bytes as made

pytest.importorskip("pydicom", minversion="3", reason="pydicom is not installed")

# Values of 12 bits, with all of their bits in use.
V = np.array([[0, 1, 4095], [2048, 1365, 2730]], dtype=np.uint16)
S = (V.astype(np.int16) - 2048).astype(np.int16)
SCALED = V / 4095.0
TWELVE: made.Tags = {0x00280101: ("US", 12), 0x00280102: ("US", 11)}
SHIFTED: made.Tags = {0x00280101: ("US", 12), 0x00280102: ("US", 15)}
WINDOW: made.Tags = {0x00281050: ("DS", "2048"), 0x00281051: ("DS", "4096")}
INVERTED: made.Tags = {0x00280004: ("CS", "MONOCHROME1")}
WINDOWED = np.clip((V - 2047.5) / 4095 + 0.5, 0, 1)
OVERLAY: made.Tags = {0x60000100: ("US", 16), 0x60000102: ("US", 15)}
OVERLAID = V | np.array([[0x8000, 0, 0], [0, 0x8000, 0]], dtype=np.uint16)


def table(descriptor: list[int], data: bytes, tag: int = 0x00283010, vr: str = "OW") -> made.Tags:
    item = made.element(0x00283002, "US", descriptor) + made.element(0x00283006, vr, data)
    return {tag: ("SQ", made.sequence(item))}


def by_frame(groups: int, macro: int, item: bytes) -> made.Tags:
    """What functional groups of frame 0, 5200,9230, or of all, 5200,9229, say in a macro."""
    return {groups: ("SQ", made.sequence(made.element(macro, "SQ", made.sequence(item))))}


RAMP = (np.arange(4096, dtype="<u2") * 16).tobytes()
RAMP_8 = (np.arange(4096, dtype="<u2") >> 4).astype("<u2")
PADDED = np.array([[1000, 1500, 9], [2000, 9, 9]], dtype=np.uint16)
ANATOMY = np.array([[0, 0.5, 0], [1, 0, 0]])  # 9 is padding

Case = tuple[Any, made.Tags, Any]
# Stored values, tags, and what is read of them: to 1e-6.
VALUES: dict[str, Case] = {
    # Which bits count
    "the highest bit as the header says": (V << 4, SHIFTED, SCALED),
    "the highest bit as the header says, signed": (S << 4, SHIFTED, SCALED),
    "the window sees the values without the bits below": (V << 4, SHIFTED | WINDOW, WINDOWED),
    "the highest bit lower than the header says": (V, SHIFTED, SCALED),
    "the highest bit lower than the header says, signed": (S, SHIFTED, SCALED),
    "the highest bit higher than the header says": (V, {0x00280102: ("US", 7)}, SCALED),
    "the highest bit outside of the number": (
        (V >> 4).astype(np.uint8),
        {0x00280102: ("US", 15)},
        (V >> 4) / 255.0,
    ),
    "the highest bit is not given": (V, TWELVE | {0x00280102: ("US", b"")}, SCALED),
    "rubbish above the bits stored": (V | 0x9000, TWELVE, SCALED),
    "the sign is the highest bit stored": (S & 0x0FFF, TWELVE, SCALED),
    "an overlay in a bit above": (OVERLAID, TWELVE | OVERLAY, SCALED),
    "an overlay in a bit that counts as stored": (OVERLAID, OVERLAY, SCALED),
    "an overlay below the highest bit": (
        (V << 4) | 1,
        SHIFTED | {0x60000100: ("US", 16), 0x60000102: ("US", 0)},
        SCALED,
    ),
    "an overlay that cannot be where it is said to be": (
        V,
        {0x60000100: ("US", 16), 0x60000102: ("US", 3)},
        SCALED,
    ),
    "an overlay of its own": (
        V,
        {0x60000100: ("US", 1), 0x60000102: ("US", 0), 0x60003000: ("OW", b"\xff\0")},
        SCALED,
    ),
    # Rescaling
    "a slope alone": (V, WINDOW | {0x00281053: ("DS", "0.5")}, 0.5 * V / 4095),
    "an intercept alone": (
        V,
        WINDOW | {0x00281052: ("DS", "-1024")},
        np.clip((V - 3071.5) / 4095 + 0.5, 0, 1),
    ),
    "an empty slope and intercept": (
        V,
        WINDOW | {0x00281052: ("DS", ""), 0x00281053: ("DS", "")},
        WINDOWED,
    ),
    "a decimal comma": (V, WINDOW | {0x00281053: ("DS", "0,5")}, 0.5 * V / 4095),
    "rescaled and windowed by frame": (
        V,
        {
            0x52009229: (
                "SQ",
                made.sequence(
                    made.element(
                        0x00289132,
                        "SQ",
                        made.sequence(
                            made.element(0x00281050, "DS", "2048")
                            + made.element(0x00281051, "DS", "4096")
                        ),
                    )
                    + made.element(
                        0x00289145,
                        "SQ",
                        made.sequence(made.element(0x00281053, "DS", "0.5")),
                    )
                ),
            )
        },
        0.5 * V / 4095,
    ),
    "a window of frame 0 that is empty, and one of all frames": (
        V,
        by_frame(0x52009230, 0x00289132, b"")
        | by_frame(
            0x52009229,
            0x00289132,
            made.element(0x00281050, "DS", "1024") + made.element(0x00281051, "DS", "2048"),
        ),
        np.clip((V - 1023.5) / 2047 + 0.5, 0, 1),
    ),
    "frame 0 says nothing, the header does": (
        V,
        by_frame(0x52009230, 0x00289132, made.element(0x00281055, "LO", "CHEST"))
        | by_frame(0x52009229, 0x00289145, made.element(0x00281054, "LO", "US"))
        | {0x00281053: ("DS", "2"), 0x00281050: ("DS", "1024"), 0x00281051: ("DS", "2048")},
        np.clip((2.0 * V - 1023.5) / 2047 + 0.5, 0, 1),
    ),
    # Windows
    "a window too narrow for its quotients": (
        V,
        {0x00281050: ("DS", "2048"), 0x00281051: ("DS", "1e-320")},
        (V > 2048) + 0.5 * (V == 2048),
    ),
    "half a window is none": (V, WINDOW | {0x00281051: ("DS", "")}, SCALED),
    "the first whole window": (
        V,
        {0x00281050: ("DS", "\\2048\\3"), 0x00281051: ("DS", "7\\4096\\3")},
        WINDOWED,
    ),
    "an empty function": (V, WINDOW | {0x00281056: ("CS", "")}, WINDOWED),
    "a function in small letters": (
        V,
        WINDOW | {0x00281056: ("CS", "linear_exact")},
        np.clip((V - 2048.0) / 4096 + 0.5, 0, 1),
    ),
    "a window of floats": (
        V,
        {0x00281050: ("FD", 2048.0), 0x00281051: ("FL", 4096.0)},
        WINDOWED,
    ),
    "a window narrower than 1": (
        V,
        {
            0x00281053: ("DS", "0.0001"),
            0x00281050: ("DS", "0.2"),
            0x00281051: ("DS", "0.4"),
        },
        np.clip((V * 1e-4 - 0.2) / 0.4 + 0.5, 0, 1),
    ),
    "a window of 1 is a threshold": (
        V,
        {0x00281050: ("DS", "2048"), 0x00281051: ("DS", "1")},
        V > 2047.5,
    ),
    # Lookup tables
    "an empty item is no table": (V, WINDOW | {0x00283010: ("SQ", made.sequence(b""))}, WINDOWED),
    "an empty sequence is no table": (V, WINDOW | {0x00283000: ("SQ", b"")}, WINDOWED),
    "fewer entries than described": (
        V,
        table([4096, 0, 16], RAMP[:6000]),
        np.minimum(V, 2999) * 16 / 65535,
    ),
    "as many bytes as entries described, of 16 bits": (
        V,
        table([4096, 0, 16], RAMP[:4096]),
        np.minimum(V, 2047) * 16 / 65535,
    ),
    "8 bits in words": (V, table([4096, 0, 8], RAMP_8.tobytes()), (V >> 4) / 255),
    "8 bits packed": (V, table([4096, 0, 8], RAMP_8.astype(np.uint8).tobytes()), (V >> 4) / 255),
    "8 bits in words, fewer than described": (
        V,
        table([4096, 0, 8], RAMP_8.tobytes()[:6000]),
        (np.minimum(V, 2999) >> 4) / 255,
    ),
    "a first value below 0, written without sign": (
        S,
        table([4096, 2**16 - 2048, 16], RAMP, vr="US"),
        V * 16 / 65535,
    ),
    "the same behind an intercept": (
        V,
        {0x00281052: ("DS", "-2048")} | table([4096, 2**16 - 2048, 16], RAMP),
        V * 16 / 65535,
    ),
    "the same in a modality table": (
        S,
        table([4096, 2**16 - 2048, 16], RAMP, tag=0x00283000),
        SCALED,
    ),
    "a modality table of fluoroscopy is not for display": (
        V,
        {0x00080016: ("UI", "1.2.840.10008.5.1.4.1.1.12.2")}
        | table([4096, 0, 16], RAMP[::-1], tag=0x00283000)
        | WINDOW,
        WINDOWED,
    ),
    "a first value above 32767": (
        (V + 40000).astype(np.uint16),
        table([4096, 40000, 16], RAMP),
        V * 16 / 65535,
    ),
    "16 bits described and 12 in use": (
        V,
        table([4096, 0, 16], np.arange(4096, dtype="<u2").tobytes()),
        SCALED,
    ),
    "12 bits described and 16 in use": (V, table([4096, 0, 12], RAMP), V * 16 / 65535),
    "16 bits that stop at a third": (
        V,
        table([4096, 0, 16], (np.arange(4096, dtype="<u2") * 5).tobytes()),
        V * 5 / 65535,
    ),
    "nothing but zeros": (V, table([4096, 0, 16], bytes(8192)), 0 * SCALED),
    "entries have no sign": (V, table([4096, 0, 16], RAMP, vr="SS"), V * 16 / 65535),
    "colours by a palette": (
        np.array([[0, 1], [2, 3]], dtype=np.uint8),
        {0x00280004: ("CS", "PALETTE COLOR")}
        | {tag: ("US", [4, 0, 16]) for tag in (0x00281101, 0x00281102, 0x00281103)}
        | {0x00281201: ("OW", struct.pack("<4H", 0, 65535, 0, 0))}
        | {0x00281202: ("OW", struct.pack("<4H", 0, 0, 65535, 0))}
        | {0x00281203: ("OW", struct.pack("<4H", 0, 0, 0, 65535))},
        [[0, 0.299], [0.587, 0.114]],
    ),
    "colours by a palette of 8 bits in 16": (
        np.array([[0, 1], [2, 3]], dtype=np.uint8),
        {0x00280004: ("CS", "PALETTE COLOR")}
        | {tag: ("US", [4, 0, 16]) for tag in (0x00281101, 0x00281102, 0x00281103)}
        | {0x00281201: ("OW", struct.pack("<4H", 0, 255, 0, 0))}
        | {0x00281202: ("OW", struct.pack("<4H", 0, 0, 255, 0))}
        | {0x00281203: ("OW", struct.pack("<4H", 0, 0, 0, 0))},
        [[0, 0.299], [0.587, 0]],
    ),
    "colours by a palette in segments": (
        np.array([[0, 1], [2, 3]], dtype=np.uint8),
        {0x00280004: ("CS", "PALETTE COLOR")}
        | {tag: ("US", [4, 0, 16]) for tag in (0x00281101, 0x00281102, 0x00281103)}
        | {0x00281221: ("OW", struct.pack("<6H", 0, 4, 0, 65535, 0, 0))}
        | {0x00281222: ("OW", struct.pack("<6H", 0, 4, 0, 0, 65535, 0))}
        | {0x00281223: ("OW", struct.pack("<6H", 0, 4, 0, 0, 0, 65535))},
        [[0, 0.299], [0.587, 0.114]],
    ),
    # Padding
    "padding counts neither as minimum nor as maximum": (
        PADDED,
        {0x00280120: ("US", 9)},
        ANATOMY,
    ),
    "padding above the anatomy": (
        np.where(PADDED == 9, 65535, PADDED).astype(np.uint16),
        {0x00280120: ("US", 65535)},
        ANATOMY,
    ),
    "padding with more bits than are stored": (
        np.where(PADDED == 9, 65535, PADDED).astype(np.uint16),
        TWELVE | {0x00280120: ("US", 65535)},
        ANATOMY,
    ),
    "padding stays black where values are inverted": (
        PADDED,
        INVERTED | {0x00280120: ("US", 9)},
        [[1, 0.5, 0], [0, 0, 0]],
    ),
    "signed padding, written without sign": (
        np.where(PADDED == 9, -2000, PADDED).astype(np.int16),
        {0x00280120: ("US", 2**16 - 2000), 0x00281053: ("DS", "2")},
        ANATOMY,
    ),
    "a range of padding": (
        np.array([[1000, 1500, 9], [2000, 4, 0]], dtype=np.uint16),
        {0x00280120: ("US", 9), 0x00280121: ("US", 0)},
        ANATOMY,
    ),
    "nothing but padding": (PADDED * 0, INVERTED | {0x00280120: ("US", 0)}, ANATOMY * 0),
    "empty padding": (V, {0x00280120: ("US", b"")}, SCALED),
    # Shape and kind of the numbers
    "no count of frames": (V, {0x00280008: ("IS", "")}, SCALED),
    "more pixels than one frame has": (V, {0x7FE00010: ("OW", V.tobytes() * 2)}, SCALED),
    "a length beyond the end of the file": (V, {0x7FE00010: ("US", V.tobytes())}, SCALED),
    "rows written as text": (V, {0x00280010: ("IS", "2")}, SCALED),
    "small letters": (V, {0x00280004: ("CS", "monochrome1")}, 1 - SCALED),
    "colours that are called signed": (
        np.array([[[255, 255, 255], [200, 0, 0]]], dtype=np.uint8),
        {0x00280006: ("US", 0), 0x00280103: ("US", 1)},
        [[1, 200 * 0.299 / 255]],
    ),
    "ACR-NEMA, older than colour": (
        V,
        {0x00080010: ("CS", "ACR-NEMA 2.0"), 0x00280002: ("US", None), 0x00280004: ("CS", None)},
        SCALED,
    ),
    "colours one after the other": (
        np.zeros((1, 2, 3), dtype=np.uint8),
        {0x00280006: ("US", 1), 0x7FE00010: ("OW", bytes([255, 0, 0, 255, 0, 0]))},
        [[0.299, 0.587]],
    ),
    "floats with padding": (
        V,
        {
            0x00280100: ("US", 32),
            0x00280122: ("FL", -1.0),
            0x7FE00008: ("OF", np.array([-1, 0, 1, 4, 2, 3], dtype="<f4").tobytes()),
            0x7FE00010: ("OW", None),
        },
        [[0, 0, 0.25], [1, 0.5, 0.75]],
    ),
    "floats of 64 bits": (
        V,
        {
            0x7FE00009: ("OD", V.astype("<f8").tobytes()),
            0x7FE00010: ("OW", None),
        },
        SCALED,
    ),
    "32 bits": (V.astype(np.uint32) << 16, {}, SCALED),
}


@pytest.mark.parametrize("case", VALUES)
def test_values(tmp_path: Path, case: str) -> None:
    stored, tags, expected = VALUES[case]
    image = read_image(made.write(tmp_path / "a.dcm", stored, tags))
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-6)


REFUSED: dict[str, tuple[made.Tags, str]] = {
    "rubbish below and above": (
        SHIFTED | {0x7FE00010: ("OW", (V << 4 | 5).tobytes())},
        r"High Bit \(0028,0102\) is 15 and Bits Stored \(0028,0101\) is 12",
    ),
    "a sign or a large number": (
        {0x00280102: ("US", 11), 0x00280103: ("US", 1)},
        r"High Bit \(0028,0102\) is 11 and Bits Stored \(0028,0101\) is 16",
    ),
    "more stored than allocated": ({0x00280101: ("US", 17)}, r"Bits Stored \(0028,0101\) is 17"),
    "none stored": ({0x00280101: ("US", 0)}, r"Bits Stored \(0028,0101\) is 0"),
    "12 bits": ({0x00280100: ("US", 12)}, r"Bits Allocated \(0028,0100\) is 12; 1, 8, 16, 32"),
    "a sign that is neither": ({0x00280103: ("US", 7)}, r"Pixel Representation \(0028,0103\) is 7"),
    "no sign": ({0x00280103: ("US", None)}, r"Pixel Representation \(0028,0103\) is missing"),
    "empty bits": ({0x00280101: ("US", b"")}, r"Bits Stored \(0028,0101\) is missing"),
    "grey with three samples": (
        {0x00280002: ("US", 3)},
        r"Samples per Pixel \(0028,0002\) is 3, but Photometric Interpretation \(0028,0004\) is "
        "MONOCHROME2, which has 1",
    ),
    "colour with one": ({0x00280004: ("CS", "RGB")}, "is 1, but .* is RGB, which has 3"),
    "an unknown colour": ({0x00280004: ("CS", "HSV")}, r"Photometric .*\(0028,0004\) is HSV; MONO"),
    "no order of colours": (
        {0x00280002: ("US", 3), 0x00280004: ("CS", "RGB")},
        r"Planar Configuration \(0028,0006\) is missing; 0 and 1 are read",
    ),
    "colours that are not subsampled": (
        {
            0x00280002: ("US", 3),
            0x00280004: ("CS", "YBR_FULL_422"),
            0x00280006: ("US", 0),
            0x7FE00010: ("OW", V.tobytes() * 3),
        },
        r"Photometric Interpretation \(0028,0004\) is YBR_FULL_422, but its colours are not",
    ),
    "a slope of 0": ({0x00281053: ("DS", "0")}, r"Rescale Slope \(0028,1053\) is 0, which"),
    "a word for a slope": ({0x00281053: ("DS", "x")}, r"Slope \(0028,1053\) is x, and a finite"),
    "a word for a window": (
        {0x00281050: ("DS", "AUTO"), 0x00281051: ("DS", "AUTO")},
        r"Window Center \(0028,1050\) is AUTO, and a finite number is needed",
    ),
    "an infinite window": (
        WINDOW | {0x00281051: ("DS", "inf")},
        r"Window Width \(0028,1051\) is inf, and a finite number is needed",
    ),
    "a negative window": (WINDOW | {0x00281051: ("DS", "-1")}, r"Width \(0028,1051\) is -1, and"),
    "an unknown function": (
        WINDOW | {0x00281056: ("CS", "CUBIC")},
        r"VOI LUT Function \(0028,1056\) is CUBIC; LINEAR, LINEAR_EXACT and SIGMOID are read",
    ),
    "a table without entries": (table([4, 0, 16], b""), r"LUT Data \(0028,3006\) is missing"),
    "a table without bits": (
        table([4, 0, 0], b"\0" * 8),
        r"LUT Descriptor \(0028,3002\) is \[4, 0, 0\]; needed are",
    ),
    "no pixels": ({0x7FE00010: ("OW", None)}, r"Pixel Data \(7FE0,0010\) is missing"),
    "a byte too few": (
        {0x7FE00010: ("OW", V.tobytes()[:-2])},
        "its pixels have 10 bytes, and 12 are expected",
    ),
    "compressed against the transfer syntax": (
        {0x7FE00010: ("OB", made.fragments(b"\xff\xd8"))},
        r"Explicit VR Little Endian \(1.2.840.10008.1.2.1\), but Pixel Data .* is compressed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(tmp_path: Path, case: str) -> None:
    tags, reason = REFUSED[case]
    pixels = tags.get(0x7FE00010, ("", None))[1]
    how = {"pixels": pixels} if pixels else {}
    with pytest.raises(ImageReadError, match=reason) as caught:
        read_image(made.write(tmp_path / "a.dcm", V, tags, **how))
    words = str(caught.value)
    assert not re.search(r"damaged|truncated|Error|None", words), words


@pytest.mark.parametrize(
    ("syntax", "kind"),
    [
        (made.EXPLICIT, ("<", True)),
        (made.IMPLICIT, ("<", False)),
        (made.IMPLICIT, ("<", True)),
        (made.BIG_ENDIAN, (">", False)),
        (made.BIG_ENDIAN, ("<", True)),
        (made.EXPLICIT, (">", False)),
        ("", ("<", True)),
        ("", (">", False)),
    ],
)
@pytest.mark.parametrize("stored", [V, S], ids=["unsigned", "signed"])
def test_the_data_set_tells_its_encoding(
    tmp_path: Path, syntax: str, kind: made.Kind, stored: Any
) -> None:
    path = made.write(tmp_path / "a.dcm", stored, WINDOW, syntax, kind=kind)
    expected = WINDOWED if stored is V else np.clip((S - 2047.5) / 4095 + 0.5, 0, 1)
    np.testing.assert_allclose(read_image(path), expected, rtol=0, atol=1e-6)


def test_a_length_that_looks_like_a_vr(tmp_path: Path) -> None:
    stored = np.arange(20290, dtype=np.uint8).reshape(10, 2029)
    path = made.write(tmp_path / "a.dcm", stored, None, made.IMPLICIT, kind=("<", True))
    assert b"\xe0\x7f\x10\x00BO\0\0" in path.read_bytes()
    np.testing.assert_allclose(read_image(path), stored / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [("<", True), (">", False)])
def test_lookup_tables_in_every_encoding(tmp_path: Path, kind: made.Kind) -> None:
    order, implicit = kind
    for data, bits, expected in (
        (RAMP, 16, V * 16 / 65535),
        (RAMP_8.tobytes(), 8, (V >> 4) / 255),
        (RAMP_8.astype(np.uint8).tobytes(), 8, (V >> 4) / 255),
    ):
        if order == ">":
            data = np.frombuffer(data, "<u2").astype(">u2").tobytes()
        item = made.element(0x00283002, "US", [4096, 0, bits], kind)
        item += made.element(0x00283006, "OW", data, kind)
        items = struct.pack(order + "HHI", 0xFFFE, 0xE000, len(item)) + item
        path = made.write(
            tmp_path / "a.dcm", V, {0x00283010: ("SQ", items)}, "", kind=(order, implicit)
        )
        np.testing.assert_allclose(read_image(path), expected, rtol=0, atol=1e-6)


def test_bytes_swapped_in_words(tmp_path: Path) -> None:
    stored = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], dtype=np.uint8)
    swapped = np.frombuffer(stored.tobytes() + b"\0", "<u2").byteswap().tobytes()
    path = made.write(
        tmp_path / "a.dcm", stored, None, made.BIG_ENDIAN, kind=(">", False), pixels=swapped
    )
    np.testing.assert_allclose(read_image(path), (stored - 10) / 80, rtol=0, atol=1e-6)


def test_incomplete_file_meta_information(tmp_path: Path) -> None:
    body, whole = made.data_set(V), made.meta()
    for head in (
        whole[:132] + whole[144:],  # without the element with its length
        whole[:140] + struct.pack("<I", 4) + whole[144:],  # with a wrong length
        whole[:132],
        whole[128:],
        whole[132:],
        b"",
        whole[:132] + made.element(0x00020010, "UI", made.EXPLICIT, ("<", True)),
    ):
        (tmp_path / "a.dcm").write_bytes(head + body)
        np.testing.assert_allclose(read_image(tmp_path / "a.dcm"), SCALED, rtol=0, atol=1e-6)


def test_deflated(tmp_path: Path) -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = deflate.compress(made.data_set(V)) + deflate.flush()
    head = made.meta(made.DEFLATED)
    path = tmp_path / "a.dcm"
    for start in (head, head[:132] + head[144:]):
        path.write_bytes(start + data)
        np.testing.assert_allclose(read_image(path), SCALED, rtol=0, atol=1e-6)
    for level in (1, 6, 9):  # with zlib's header
        path.write_bytes(head + zlib.compress(made.data_set(V), level))
        np.testing.assert_allclose(read_image(path), SCALED, rtol=0, atol=1e-6)
    path.write_bytes(head + made.data_set(V))
    with pytest.raises(ImageReadError, match="says that it is deflated, but it is not"):
        read_image(path)


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.10008.1.2.4.100", "MPEG2 Main Profile"),
        ("1.2.840.10008.1.2.4.107", "HEVC/H.265 Main Profile"),
        ("1.2.3.4", "1.2.3.4, which is not read"),
    ],
)
def test_a_transfer_syntax_that_is_not_read(tmp_path: Path, syntax: str, name: str) -> None:
    path = made.write(tmp_path / "a.dcm", V, None, syntax, pixels=made.fragments(b"\0\0\1\xb3"))
    with pytest.raises(ImageReadError, match=f"its transfer syntax is {name}"):
        read_image(path)
