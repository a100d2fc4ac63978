"""DICOM: modality, then values of interest, then polarity, with files made here."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squid_fast.data import ImageReadError, read_image
from squid_fast.data import dicom as dicom_reader

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


def test_without_a_window_minimum_to_maximum(tmp_path: Path) -> None:
    image = read_image(dicom(tmp_path / "a.dcm"))
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, STORED / 500, atol=1e-6)


def test_monochrome1_is_inverted_last(tmp_path: Path) -> None:
    image = read_image(dicom(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_allclose(image, 1 - STORED / 500, atol=1e-6)
    tags: dict[str, Any] = {"WindowCenter": 200.5, "WindowWidth": 201}
    plain = read_image(dicom(tmp_path / "b.dcm", **tags))
    inverted = read_image(
        dicom(tmp_path / "c.dcm", PhotometricInterpretation="MONOCHROME1", **tags)
    )
    np.testing.assert_allclose(inverted, 1 - plain, atol=1e-6)


def test_the_window_sees_rescaled_values(tmp_path: Path) -> None:
    # stored 0..500 -> modality -1000..0; the window spans -800..-400 with its ends at 0 and 1
    tags: dict[str, Any] = {"RescaleSlope": 2, "RescaleIntercept": -1000}
    path = dicom(tmp_path / "a.dcm", WindowCenter=-599.5, WindowWidth=401, **tags)
    expected = np.clip((STORED * 2.0 - 1000 + 800) / 400, 0, 1)
    np.testing.assert_allclose(read_image(path), expected, atol=1e-6)


def test_window_functions_and_alternatives(tmp_path: Path) -> None:
    exact = dicom(
        tmp_path / "a.dcm", WindowCenter=250, WindowWidth=500, VOILUTFunction="LINEAR_EXACT"
    )
    np.testing.assert_allclose(read_image(exact), STORED / 500, atol=1e-6)
    sigmoid = dicom(tmp_path / "b.dcm", WindowCenter=200, WindowWidth=100, VOILUTFunction="SIGMOID")
    expected = 1 / (1 + np.exp(-4 * (STORED.astype(float) - 200) / 100))
    np.testing.assert_allclose(read_image(sigmoid), expected, atol=1e-6)
    several = dicom(tmp_path / "c.dcm", WindowCenter=[200.5, 40], WindowWidth=[201, 2])
    expected = np.clip((STORED - 100.0) / 200, 0, 1)
    np.testing.assert_allclose(read_image(several), expected, atol=1e-6)


def test_a_negative_slope_turns_the_picture_once(tmp_path: Path) -> None:
    path = dicom(
        tmp_path / "a.dcm",
        RescaleSlope=-1,
        RescaleIntercept=500,
        WindowCenter=250.5,
        WindowWidth=501,
    )
    np.testing.assert_allclose(read_image(path), 1 - STORED / 500, atol=1e-6)


def test_lookup_tables_may_be_narrower_than_the_pixels(tmp_path: Path) -> None:
    # 8-bit entries indexed by values beyond 255
    table = lookup_table([0, 51, 102, 255], first=199, bits=8)
    image = read_image(dicom(tmp_path / "a.dcm", VOILUTSequence=table))
    np.testing.assert_allclose(image, [[0.0, 0.0, 0.2], [1.0, 1.0, 1.0]], atol=1e-6)
    sixteen = lookup_table([0, 65535], first=399, bits=16)
    image = read_image(dicom(tmp_path / "b.dcm", VOILUTSequence=sixteen))
    np.testing.assert_array_equal(image, [[0, 0, 0], [0, 1, 1]])
    beyond = lookup_table([0, 4095, 65535], first=399, bits=12)  # its entries exceed 12 bits
    image = read_image(dicom(tmp_path / "c.dcm", VOILUTSequence=beyond))
    np.testing.assert_array_equal(image, [[0, 0, 0], [0, 1, 1]])


def test_a_modality_table_before_the_window(tmp_path: Path) -> None:
    table = lookup_table(list(range(1000, 0, -1)), first=0, bits=16)  # value v -> 1000 - v
    path = dicom(tmp_path / "a.dcm", ModalityLUTSequence=table, WindowCenter=750.5, WindowWidth=501)
    np.testing.assert_allclose(read_image(path), (500 - STORED) / 500, atol=1e-6)


def test_signed_multiframe_and_constant(tmp_path: Path) -> None:
    signed = np.array([[-100, 0, 100]], dtype=np.int16)
    np.testing.assert_allclose(
        read_image(dicom(tmp_path / "a.dcm", signed)), [[0, 0.5, 1]], atol=1e-6
    )
    first = STORED[:, :2]
    frames = np.stack([first, first[::-1]])
    np.testing.assert_allclose(
        read_image(dicom(tmp_path / "b.dcm", frames)), first / 400, atol=1e-6
    )
    for polarity in ("MONOCHROME1", "MONOCHROME2"):
        flat = dicom(
            tmp_path / "c.dcm", np.full((2, 2), 9, np.uint16), PhotometricInterpretation=polarity
        )
        np.testing.assert_array_equal(read_image(flat), np.zeros((2, 2)))


def test_colour_becomes_luminance(tmp_path: Path) -> None:
    colour = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
    path = dicom(tmp_path / "a.dcm", colour, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    np.testing.assert_allclose(read_image(path), [[0.299, 0.587], [0.114, 1.0]], atol=1e-6)


def test_files_without_suffix_or_preamble(tmp_path: Path) -> None:
    np.testing.assert_allclose(read_image(dicom(tmp_path / "IM0001")), STORED / 500, atol=1e-6)
    bare = dicom(tmp_path / "old.dcm", preamble=False)
    assert bare.read_bytes()[128:132] != b"DICM"
    np.testing.assert_allclose(read_image(bare), STORED / 500, atol=1e-6)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    report = dicom(tmp_path / "sr.dcm", None, Modality="SR")
    with pytest.raises(ImageReadError, match=r"without an image.*Modality is SR"):
        read_image(report)
    header = dicom(tmp_path / "header.dcm", None, Rows=4, Columns=4)
    with pytest.raises(ImageReadError, match=r"header.dcm"):
        read_image(header)
    huge = dicom(tmp_path / "huge.dcm", Rows=30_000, Columns=30_000)
    with pytest.raises(ImageReadError, match="30000x30000"):
        read_image(huge)
    text = tmp_path / "text.dcm"
    text.write_text("this is no DICOM file, though it says so " * 10)
    with pytest.raises(ImageReadError, match=r"text.dcm"):
        read_image(text)
    window = dicom(tmp_path / "window.dcm", WindowCenter=100, WindowWidth=0)
    with pytest.raises(ImageReadError, match="Window Width"):
        read_image(window)
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
        ({"Rows": 9_000, "Columns": 9_000}, "could not be decoded as DICOM"),
        ({"SamplesPerPixel": 65_535}, "could not be decoded as DICOM"),
    ],
)
def test_sizes_that_are_only_claimed(tmp_path: Path, claim: dict[str, int], reason: str) -> None:
    with pytest.raises(ImageReadError, match=reason):
        read_image(dicom(tmp_path / "a.dcm", **claim))


def test_frames_that_are_only_claimed_do_not_matter(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", NumberOfFrames=2**31 - 1)
    np.testing.assert_allclose(read_image(path), STORED / 500, atol=1e-6)
