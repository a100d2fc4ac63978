"""DICOM: modality, then values of interest, then polarity, with files made here."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squid_fast.data import ImageReadError, read_image
from squid_fast.data.dicom import reader as dicom_reader

pydicom = pytest.importorskip("pydicom", minversion="3", reason="pydicom is not installed")

STORED = np.array([[0, 100, 200], [300, 400, 500]], dtype=np.uint16)
EXPLICIT = "1.2.840.10008.1.2.1"


def dicom(path: Path, stored: Any = STORED, preamble: bool = True, **tags: Any) -> Path:
    dataset = pydicom.Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = "1.2.3"
    dataset.Modality = "DX"
    if stored is not None:
        stored = np.asarray(stored)
        frames = stored if stored.ndim == 3 and stored.shape[-1] != 3 else stored[None]
        if len(frames) > 1:
            dataset.NumberOfFrames = len(frames)
        dataset.Rows, dataset.Columns = frames.shape[1:3]
        dataset.SamplesPerPixel = 3 if stored.shape[-1] == 3 and stored.ndim == 3 else 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated = 8 * stored.dtype.itemsize
        dataset.BitsStored = dataset.BitsAllocated
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(stored.dtype.kind == "i")
        data = stored.tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
    for name, value in tags.items():
        setattr(dataset, name, value)
    if not preamble:
        pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=True)
        return path
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = EXPLICIT
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)
    return path


def lookup_table(values: list[int], first: int, bits: int) -> Any:
    item = pydicom.Dataset()
    item.add_new(0x00283002, "US", [len(values), first, bits])
    item.add_new(0x00283006, "US", values)
    return pydicom.Sequence([item])


COLOUR = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
INVERTED = {"PhotometricInterpretation": "MONOCHROME1"}
WINDOW = {"WindowCenter": 200.5, "WindowWidth": 201}
WINDOWED = np.clip((STORED - 100.0) / 200, 0, 1)

# The tags of a file with the values STORED, and what is read of it: to 1e-6, integers exactly.
VALUES: dict[str, tuple[dict[str, Any], Any]] = {
    "minimum to maximum without a window": ({}, STORED / 500),
    "inverted": (INVERTED, 1 - STORED / 500),
    "windowed": (WINDOW, WINDOWED),
    "inverted behind the window": (INVERTED | WINDOW, 1 - WINDOWED),
    # stored 0..500 -> modality -1000..0; the window spans -800..-400 with its ends at 0 and 1
    "the window sees rescaled values": (
        {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": -599.5, "WindowWidth": 401},
        np.clip((STORED * 2.0 - 1000 + 800) / 400, 0, 1),
    ),
    "a linear window without the half pixels": (
        {"WindowCenter": 250, "WindowWidth": 500, "VOILUTFunction": "LINEAR_EXACT"},
        STORED / 500,
    ),
    "a sigmoid": (
        {"WindowCenter": 200, "WindowWidth": 100, "VOILUTFunction": "SIGMOID"},
        1 / (1 + np.exp(-4 * (STORED.astype(float) - 200) / 100)),
    ),
    "the first of several windows": (
        {"WindowCenter": [200.5, 40], "WindowWidth": [201, 2]},
        WINDOWED,
    ),
    "a negative slope turns the picture once": (
        {"RescaleSlope": -1, "RescaleIntercept": 500, "WindowCenter": 250.5, "WindowWidth": 501},
        1 - STORED / 500,
    ),
    # Entries of 8 bits, indexed by values beyond 255.
    "a table narrower than the pixels": (
        {"VOILUTSequence": lookup_table([0, 51, 102, 255], first=199, bits=8)},
        [[0.0, 0.0, 0.2], [1.0, 1.0, 1.0]],
    ),
    "a table of 16 bits": (
        {"VOILUTSequence": lookup_table([0, 65535], first=399, bits=16)},
        [[0, 0, 0], [0, 1, 1]],
    ),
    "a table whose entries exceed its 12 bits": (
        {"VOILUTSequence": lookup_table([0, 4095, 65535], first=399, bits=12)},
        [[0, 0, 0], [0, 1, 1]],
    ),
    # value v -> 1000 - v
    "a modality table before the window": (
        {"ModalityLUTSequence": lookup_table(list(range(1000, 0, -1)), first=0, bits=16)}
        | {"WindowCenter": 750.5, "WindowWidth": 501},
        (500 - STORED) / 500,
    ),
    "signed": ({"stored": np.array([[-100, 0, 100]], dtype=np.int16)}, [[0, 0.5, 1]]),
    "the first of two frames": (
        {"stored": np.stack([STORED[:, :2], STORED[::-1, :2]])},
        STORED[:, :2] / 400,
    ),
    "constant": ({"stored": np.full((2, 2), 9, np.uint16)}, [[0, 0], [0, 0]]),
    "constant and inverted": (
        {"stored": np.full((2, 2), 9, np.uint16)} | INVERTED,
        [[0, 0], [0, 0]],
    ),
    "colour becomes luminance": (
        {"stored": COLOUR, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
        [[0.299, 0.587], [0.114, 1.0]],
    ),
    "more frames claimed than there are": ({"NumberOfFrames": 2**31 - 1}, STORED / 500),
}


@pytest.mark.parametrize("case", VALUES)
def test_values(tmp_path: Path, case: str) -> None:
    tags, expected = VALUES[case]
    image = read_image(dicom(tmp_path / "a.dcm", **tags))
    assert image.dtype == np.float32
    exact = np.asarray(expected).dtype.kind == "i"
    np.testing.assert_allclose(image, expected, rtol=0, atol=0 if exact else 1e-6)


def test_files_without_suffix_or_preamble(tmp_path: Path) -> None:
    np.testing.assert_allclose(read_image(dicom(tmp_path / "IM0001")), STORED / 500, atol=1e-6)
    bare = dicom(tmp_path / "old.dcm", preamble=False)
    assert bare.read_bytes()[128:132] != b"DICM"
    np.testing.assert_allclose(read_image(bare), STORED / 500, atol=1e-6)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    text = tmp_path / "text.dcm"
    text.write_text("this is no DICOM file, though it says so " * 10)
    for path, reason in (
        (dicom(tmp_path / "sr.dcm", None, Modality="SR"), "without an image.*Modality is SR"),
        (dicom(tmp_path / "header.dcm", None, Rows=4, Columns=4), r"header.dcm"),
        (dicom(tmp_path / "huge.dcm", Rows=30_000, Columns=30_000), "30000x30000"),
        (text, r"text.dcm is not an image in a known format"),
        (dicom(tmp_path / "window.dcm", WindowCenter=100, WindowWidth=0), "Window Width"),
    ):
        with pytest.raises(ImageReadError, match=reason):
            read_image(path)
    whole = dicom(tmp_path / "cut.dcm", np.zeros((64, 64), np.uint16)).read_bytes()
    for share in (0.2, 0.6, 0.99):
        (tmp_path / "cut.dcm").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ImageReadError, match=r"cut.dcm"):
            read_image(tmp_path / "cut.dcm")


def test_a_deflated_file_is_not_inflated_without_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.dcm"
    dataset = pydicom.dcmread(dicom(path))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    np.testing.assert_allclose(read_image(path), STORED / 500, atol=1e-6)
    meta = pydicom.filereader.read_file_meta_info(path)
    head = path.read_bytes()[: 144 + meta.FileMetaInformationGroupLength]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    with open(path, "wb") as file:
        file.write(head)
        file.write(deflate.compress(b"\0" * (9 << 20)) + deflate.flush())
    monkeypatch.setattr(dicom_reader, "_MAX_INFLATED", 8 << 20)
    with pytest.raises(ImageReadError, match="inflates to more than 8388608 bytes"):
        read_image(path)


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ({"Rows": 60_000, "Columns": 60_000}, "60000x60000 = 3600000000 pixels"),
        ({"Rows": 9_000, "Columns": 9_000}, "have 12 bytes, and 162000000 are expected"),
        ({"SamplesPerPixel": 65_535}, r"Samples per Pixel \(0028,0002\) is 65535, but"),
    ],
)
def test_sizes_that_are_only_claimed(tmp_path: Path, claim: dict[str, int], reason: str) -> None:
    with pytest.raises(ImageReadError, match=reason):
        read_image(dicom(tmp_path / "a.dcm", **claim))
