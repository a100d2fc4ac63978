"""A folder of many small images, some of them broken in the ways that archives have them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

_ORIGINALS = 300  # images that differ; the rest are hard links to them
_FOLDERS = 20
_STRANGE_NAMES = 0.01  # share of the whole files whose names are not UTF-8


@dataclass
class ImageFolder:
    """Paths of images."""

    files: list[str] = field(default_factory=list)  # in the order in which screening lists them
    broken: set[str] = field(default_factory=set)
    originals: dict[str, Path] = field(default_factory=dict)  # the image behind each whole one


def make_images(
    folder: Path, files: int, broken: int, generator: np.random.Generator
) -> ImageFolder:
    """Fill ``folder`` with ``files`` images, ``broken`` of them broken, by turns in each way.

    What the hard links lead to stands in a folder ``originals`` beside it.
    """
    originals = _write_originals(folder.with_name("originals"), generator)
    for number in range(_FOLDERS):
        (folder / f"ward-{number:02d}").mkdir(parents=True)
    made, ways = ImageFolder(), list(BROKEN.items())
    chosen = set(generator.choice(files, broken, replace=False).tolist())
    for number in range(files):
        stem = folder / f"ward-{number % _FOLDERS:02d}" / f"{number:06d}"
        if number in chosen:
            name, break_file = ways[len(made.broken) % len(ways)]
            path = f"{stem}-{name}"
            break_file(path, generator)
            made.broken.add(path)
        else:
            original = originals[generator.integers(len(originals))]
            strange = "\udce9" if generator.random() < _STRANGE_NAMES else ""
            path = f"{stem}{strange}{original.suffix}"
            os.link(original, path)
            made.originals[path] = original
        made.files.append(path)
    made.files.sort()
    return made


def _write_originals(folder: Path, generator: np.random.Generator) -> list[Path]:
    folder.mkdir(parents=True)
    paths = []
    for number in range(_ORIGINALS):
        height, width = generator.integers(24, 96, 2)
        pixels = generator.integers(0, 256, (height, width), dtype=np.uint8)
        path = folder / f"{number:03d}{('.jpg', '.png', '.npy')[number % 3]}"
        if path.suffix == ".npy":
            np.save(path, pixels)
        else:
            Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


def _truncated(path: str, generator: np.random.Generator) -> None:
    Image.fromarray(generator.integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    os.truncate(path, int(os.path.getsize(path) * generator.uniform(0.3, 0.7)))


def _bomb(path: str, generator: np.random.Generator) -> None:
    """A PNG that claims a size no memory holds."""
    side = int(generator.integers(60_000, 1_000_000))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        check = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + check
    Path(path).write_bytes(content)


def _nan(path: str, generator: np.random.Generator) -> None:
    pixels = generator.random((48, 48), dtype=np.float32)
    pixels[generator.integers(48), generator.integers(48)] = np.nan
    np.save(path, pixels)


BROKEN: dict[str, Callable[[str, np.random.Generator], object]] = {
    "truncated.jpg": _truncated,
    "truncated.png": _truncated,
    "empty.png": lambda path, generator: Path(path).touch(),
    "text.jpg": lambda path, generator: Path(path).write_text("this is no image\n"),
    "bomb.png": _bomb,
    "garbage.dcm": lambda path, generator: Path(path).write_bytes(generator.bytes(4096)),
    "dangling.png": lambda path, generator: os.symlink("nowhere.png", path),
    "folder.png": lambda path, generator: os.mkdir(path),
    "pipe.png": lambda path, generator: os.mkfifo(path),
    "nan.npy": _nan,
}
