"""Where the images of a dataset are and what is known of them, by the names of its folders.

Layouts that read lists are in ``squid_fast.data.tables``.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from .formats import IMAGE_SUFFIXES, is_image
from .records import ANOMALOUS, NORMAL, SPLITS, Layout, LayoutError, Record, enumerated
from .tables import TABLE_LAYOUTS


def find_records(root: str | os.PathLike[str], layout: str = "auto") -> list[Record]:
    """List the images of a dataset, each once, sorted by path.

    The layouts, in the order in which ``"auto"`` tries them:

    - ``authors``: ``{split}/normal_256`` and ``{split}/pneumonia_256`` or ``abnormal_256``, as in
      the published code. A folder counts as a split by the first part of its name
      (``valid_256_pa`` is "val").
    - ``archive``: ``{train,val,test}/NORMAL``, and any other class folder beside it is anomalous
      (``PNEUMONIA``). Upper and lower case are the same.
    - ``medianomaly``: ``images/`` and ``data.json``.
    - ``chexpert``: ``train.csv`` and perhaps ``valid.csv``.
    - ``covidx``: ``train.txt``, ``val.txt``, ``test.txt`` or ``train_COVIDx9A.txt`` and the like.
    - ``table``: a CSV with the column ``image_path``, or a folder with exactly one such CSV.
    - ``flat``: any folder of images, searched recursively; labels and splits unknown.

    ``squid_fast.data.tables`` describes the four that read lists. A split may be absent. Files
    that a list names are not opened here: whether they exist turns out when they are read.

    Raises:
        LayoutError: nothing is there, no layout fits, or an image has two labels or two splits.
        ValueError: ``layout`` is not a known name.

    >>> for name in ("train/NORMAL/a.png", "test/NORMAL/b.png", "test/PNEUMONIA/c.png"):
    ...     Path(name).parent.mkdir(parents=True)
    ...     Path(name).touch()
    >>> [(record.path.name, record.label, record.split) for record in find_records(".")]
    [('b.png', 0, 'test'), ('c.png', 1, 'test'), ('a.png', 0, 'train')]
    """
    root = Path(root)
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; known are auto, {', '.join(LAYOUTS)}")
    if not root.exists():
        raise LayoutError(f"{root} does not exist; give the folder of a dataset")
    if root.is_file() and root.suffix.lower() != ".csv":
        raise LayoutError(f"{root} is a file; give the folder of a dataset, or a CSV table")
    if root.is_file() and layout not in ("auto", "table"):
        raise LayoutError(f"{root} is a file; the layout {layout!r} needs a folder")
    try:
        name = _recognise(root) if layout == "auto" else layout
        records = list(LAYOUTS[name][1](root))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LayoutError(f"{root} cannot be listed: {error}") from error
    if not records:
        raise LayoutError(f"no images in the layout {name!r}: {_inventory(root)}")
    return _each_once(records)


def _recognise(root: Path) -> str:
    for name, (fits, _) in LAYOUTS.items():
        if fits(root):
            return name
    raise LayoutError(
        f"no known layout fits {_inventory(root)}. Known are {', '.join(LAYOUTS)}; for example "
        "train/NORMAL and test/PNEUMONIA folders, a CSV with the column image_path, or a folder "
        "of images (layout 'flat' takes images without labels, whatever the folders are called)"
    )


def _each_once(records: list[Record]) -> list[Record]:
    known: dict[Path, Record] = {}
    for record in records:
        first = known.setdefault(record.path, record)
        if first != record:
            raise LayoutError(
                f"{record.path} is listed twice: with label {first.label} in split {first.split} "
                f"and with label {record.label} in split {record.split}; an image has one of each"
            )
    return sorted(known.values(), key=lambda record: record.path.as_posix())


def _inventory(root: Path) -> str:
    if root.is_file():
        return f"{root} (a file)"
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if not entry.is_dir()]
    return f"{root} holds {enumerated(folders, 'folders')} and {enumerated(files, 'files')}"


def _images_under(folder: Path) -> Iterator[Path]:
    """Image files by suffix, and DICOM files that have none (or a UID for a name)."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        for name in files:
            path = Path(parent, name)
            suffix = path.suffix.lower()
            if _hidden(name):
                continue
            if suffix in IMAGE_SUFFIXES or (not suffix.strip(".0123456789") and is_image(path)):
                yield path


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _subfolders(folder: Path) -> dict[str, Path]:
    """Folders by their name in lower case."""
    if not folder.is_dir():
        return {}
    folders: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _hidden(path.name):
            twin = folders.setdefault(path.name.lower(), path)
            if twin is not path:
                raise LayoutError(f"{twin} and {path} differ in case alone; one of them has to go")
    return folders


def _author_splits(root: Path) -> Iterator[tuple[str, dict[str, Path]]]:
    for name, folder in _subfolders(root).items():
        split = SPLITS.get(name.split("_")[0])
        classes = _subfolders(folder) if split else {}
        if split and "normal_256" in classes:
            yield split, classes


def _authors(root: Path) -> Iterator[Record]:
    labels = {"normal_256": NORMAL, "pneumonia_256": ANOMALOUS, "abnormal_256": ANOMALOUS}
    for split, classes in _author_splits(root):
        for name, label in labels.items():
            if name in classes:
                yield from (Record(path, label, split) for path in _images_under(classes[name]))


def _fits_authors(root: Path) -> bool:
    return any(True for _ in _author_splits(root))


def _archive(root: Path) -> Iterator[Record]:
    splits = {name: path for name, path in _subfolders(root).items() if name in SPLITS}
    for name, folder in splits.items():
        loose = [path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        if loose:
            raise LayoutError(
                f"{folder} holds {enumerated(loose, 'images')} beside its class folders; put them "
                "into one of these"
            )
        for class_name, class_folder in _subfolders(folder).items():
            label = NORMAL if class_name == "normal" else ANOMALOUS
            yield from (Record(path, label, SPLITS[name]) for path in _images_under(class_folder))


def _fits_archive(root: Path) -> bool:
    return any(
        name in SPLITS and "normal" in _subfolders(folder)
        for name, folder in _subfolders(root).items()
    )


def _flat(root: Path) -> Iterator[Record]:
    return (Record(path, None, None) for path in _images_under(root))


def _fits_flat(root: Path) -> bool:
    """Not if it has splits: without a NORMAL folder in them that is more likely a mistake."""
    if not root.is_dir() or any(name in SPLITS for name in _subfolders(root)):
        return False
    return any(True for _ in _images_under(root))


LAYOUTS: dict[str, Layout] = {
    "authors": (_fits_authors, _authors),
    "archive": (_fits_archive, _archive),
    **TABLE_LAYOUTS,
    "flat": (_fits_flat, _flat),
}
"""Layouts by name, in the order in which they are tried."""
