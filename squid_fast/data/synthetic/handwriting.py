"""Handwritten digits from the files of MNIST or from scikit-learn, divided into splits."""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ...utils.extras import require

SPLITS = ("train", "val", "test")

Bytes = npt.NDArray[np.uint8]

_SHARES = (0.6, 0.8)  # where train and val end
_IDX_UINT8 = 0x08


class DigitSourceError(ValueError):
    """Handwritten digits could not be found or read; the message says where and why."""


def bundled_digits() -> tuple[Bytes, npt.NDArray[np.int64]]:
    """The 1,797 digits of scikit-learn in the form of ``load_mnist``, h = w = 12.

    A margin of 2 pixels around the 8 x 8 makes them fill their frame as MNIST's do. ImportError
    if scikit-learn is not installed.
    """
    digits = require("sklearn.datasets", "train").load_digits()
    images = np.pad(digits.images * (255 / 16), ((0, 0), (2, 2), (2, 2)))
    return np.round(images).astype(np.uint8), digits.target.astype(np.int64)


def load_mnist(source: str | os.PathLike[str]) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Read MNIST: uint8 ``[n, h, w]``, white ink on black, and labels, int64 ``[n]`` in 0..9.

    ``source`` is the images' file or the folder that holds it, where "train" comes before "t10k".
    The labels' file has the same name with "labels" for "images" and "idx1" for "idx3". Either may
    be gzipped.

    Raises:
        DigitSourceError: a file is missing or is not what its name says.
    """
    images_path = _images_file(Path(source))
    stem = images_path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    candidates = (images_path.with_name(name) for name in (stem, stem + ".gz"))
    labels_path = next((path for path in candidates if path.is_file()), images_path)
    if labels_path == images_path:
        raise DigitSourceError(f"{images_path} has no labels: {stem} or {stem}.gz is not beside it")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DigitSourceError(
            f"{images_path} has the shape {list(images.shape)} and {labels_path.name} "
            f"{list(labels.shape)}; [n, h, w] and [n] are needed"
        )
    if labels.size and labels.max() > 9:
        raise DigitSourceError(f"{labels_path} holds the label {labels.max()}; 0 to 9 are digits")
    return images, labels.astype(np.int64)


def _images_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise DigitSourceError(f"{source} does not exist; give MNIST's folder or its images' file")
    found = {
        match.group(1): path
        for path in sorted(source.iterdir(), reverse=True)
        if (match := re.fullmatch(r"(train|t10k)-images[-.]idx3-ubyte(\.gz)?", path.name))
    }
    if not found:
        raise DigitSourceError(
            f"{source} holds neither train-images-idx3-ubyte nor t10k-images-idx3-ubyte (or .gz)"
        )
    return found["train" if "train" in found else "t10k"]


def read_idx(path: str | os.PathLike[str]) -> Bytes:
    """Read an IDX file of unsigned bytes, gzipped or not, in the shape that its header gives.

    DigitSourceError if it cannot be read, is no such file, or its size does not fit its header.
    """
    path = Path(path)
    try:
        with open(path, "rb") as probe:
            zipped = probe.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:2] != b"\0\0" or start[2] != _IDX_UINT8 or not start[3]:
                raise DigitSourceError(
                    f"{path} begins with {start!r}; an IDX file of bytes begins with 00 00 08 "
                    "and its number of dimensions"
                )
            sizes = file.read(4 * start[3])
            if len(sizes) < 4 * start[3]:
                raise DigitSourceError(f"{path} ends within its header of {start[3]} sizes")
            shape = [int(size) for size in np.frombuffer(sizes, dtype=">u4")]
            expected = math.prod(shape)
            data = file.read(expected + 1)
    except DigitSourceError:
        raise
    except (OSError, EOFError, zlib.error, MemoryError, OverflowError, ValueError) as error:
        raise DigitSourceError(f"{path} cannot be read: {error}") from error
    if len(data) != expected:
        held = "more" if len(data) > expected else len(data)
        raise DigitSourceError(
            f"{path} promises {expected} bytes in the shape {shape} and holds {held}"
        )
    return np.frombuffer(bytearray(data), dtype=np.uint8).reshape(shape)


def split_members(classes: torch.Tensor, split: str, seed: int) -> list[torch.Tensor]:
    """The drawings of each digit that belong to a split: 60 : 20 : 20, shuffled by seed.

    From the digit of each drawing, int64 ``[n]``; for each digit, 0 to 9, indices into them, int64.
    DigitSourceError if a digit has too few drawings for the split.
    """
    which = SPLITS.index(split)
    generator = torch.Generator().manual_seed(seed)
    members = []
    for digit in range(10):
        drawings = (classes == digit).nonzero()[:, 0]
        shuffled = drawings[torch.randperm(len(drawings), generator=generator)]
        ends = [0, *(math.floor(share * len(shuffled)) for share in _SHARES), len(shuffled)]
        chosen = shuffled[ends[which] : ends[which + 1]]
        if len(chosen) == 0:
            raise DigitSourceError(
                f"the source has {len(drawings)} drawings of the digit {digit}, none is left for "
                f"the split {split!r}; at least 5 of each digit are needed"
            )
        members.append(chosen)
    return members
