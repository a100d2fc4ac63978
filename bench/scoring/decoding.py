"""How many radiographs one core decodes in a second, from files of several kinds.

The files lie in memory, so that the disk does not count. Figures go to ``decoding_cpu.json``. The
environment variable SQUID_FAST_SHARED names the folder in which the radiographs are looked for.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch

from squid_fast.data.readers import load_bytes, load_image

from ..arguments import add_option, add_output
from ..measurements import ROOT, Results

SHARED = Path(os.environ.get("SQUID_FAST_SHARED") or ROOT.parent / "shared")
SIDE = 128
_LARGE = 2048
_NOISE = 2.5  # grey levels of 255; without any, an enlarged image makes too small a file
_ROUNDS = 5


def measure(images: Path, rounds: int = _ROUNDS) -> dict[str, dict[str, float]]:
    """Files/s that one core decodes, and their mean size in bytes, by kind of file."""
    found = sorted(path for path in images.rglob("*") if path.suffix in (".jpeg", ".jpg"))[:200]
    if not found:
        raise SystemExit(f"{images} holds no JPEG files; --images takes a folder of radiographs.")
    with tempfile.TemporaryDirectory() as folder:
        jpeg, dicom = large_files(found[0], Path(folder))
        kinds = {
            "JPEG 224 × 224": found,
            f"JPEG {_LARGE} × {_LARGE}": [jpeg] * 4,
            f"DICOM {_LARGE} × {_LARGE}, 12 bits": [dicom] * 4,
        }
        return {name: _decode(files, rounds) for name, files in kinds.items()}


def _decode(files: list[Path], rounds: int) -> dict[str, float]:
    seconds = []
    for _ in range(rounds + 1):  # the first brings the files into memory
        started = time.process_time()  # what else runs on the core does not count
        for path in files:
            load_bytes(path, SIDE)
        seconds.append((time.process_time() - started) / len(files))
    return {
        "bytes": round(statistics.mean(path.stat().st_size for path in files)),
        "files_per_second": round(1 / statistics.median(seconds[1:]), 1),
    }


def large_files(source: Path, folder: Path) -> tuple[Path, Path]:
    """A radiograph enlarged, with a detector's noise, as JPEG and as DICOM without compression."""
    from PIL import Image
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    image = Image.fromarray(load_image(source, _LARGE) * 255)
    noise = np.random.default_rng(0).normal(0, _NOISE, (_LARGE, _LARGE))
    pixels = np.clip(np.asarray(image) + noise, 0, 255)
    jpeg, dicom = folder / "large.jpeg", folder / "large.dcm"
    Image.fromarray(pixels.astype(np.uint8)).save(jpeg, quality=90)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    uid = generate_uid(entropy_srcs=[jpeg.name])  # a random one varies in length
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid
    dataset.Rows = dataset.Columns = _LARGE
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = (pixels * (4095 / 255)).astype(np.uint16).tobytes()
    dataset.save_as(dicom, enforce_file_format=True)
    return jpeg, dicom


def add_arguments(parser: ArgumentParser) -> None:
    help = "Folder of radiographs as JPEG files"
    add_option(parser, "--images", SHARED / "data" / "zhanglab" / "test", help)
    add_output(parser)


def main(options: Namespace) -> None:
    """Measure and write the results file."""
    torch.set_num_threads(1)
    settings = {"rounds": _ROUNDS, "side": SIDE}
    results = Results(options.output / "decoding_cpu.json", torch.device("cpu"), settings)
    results.figures["files"] = measure(options.images)
    results.write()
    print(results.path.read_text(encoding="utf-8"))
