"""Where the images of a dataset are and what is known of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..utils.text import shown
from .csv_files import TableError
from .folders import FLAT, FOLDER_LAYOUTS, subfolders, why_not_flat
from .formats import IMAGE_SUFFIXES
from .listing import LeftOut, is_passed_over
from .records import SPLITS, Layout, LayoutError, Record, enumerated
from .tables import TABLE_LAYOUTS, columns, csv_files


def find_records(
    root: str | os.PathLike[str], layout: str = "auto", left_out: LeftOut | None = None
) -> list[Record]:
    """List the images of a dataset, each once, sorted by path.

    The layouts, in the order in which ``"auto"`` tries them:

    - ``authors``: ``{split}/normal_256`` and ``{split}/pneumonia_256`` or ``abnormal_256``, as in
      the published code.
    - ``archive``: ``{train,val,test}/NORMAL``, and any other class folder beside it is anomalous
      (``PNEUMONIA``); or these class folders alone, without splits. ``Training set``, ``Testing``
      and ``good``, ``healthy`` or ``gesund`` will do as well.
    - ``medianomaly``: ``images/`` and ``data.json``.
    - ``chexpert``: ``train.csv`` and perhaps ``valid.csv``.
    - ``covidx``: ``train.txt``, ``val.txt``, ``test.txt`` or ``train_COVIDx9A.txt`` and the like.
    - ``nih``: a CSV with ``Image Index`` and ``Finding Labels``, as of ChestX-ray14.
    - ``rsna``: a CSV with ``patientId`` and ``Target``, as of the pneumonia challenge.
    - ``table``: a CSV with the column ``image_path``, or a folder with exactly one such CSV.
    - ``flat``: a folder of images whose labels and splits are unknown. It is recognised only if
      nothing speaks of labels: no table lies beside the images, folders in it are called like
      patients, sites or dates, and no image after a disease or split. By its name, it takes the
      images of any folder.

    ``squid_fast.data.folders`` and ``squid_fast.data.tables`` describe them. A split may be absent.
    Where the only folder in ``root`` has such a layout, and not ``root`` itself, it is that one
    which is listed. Files that a list names are not opened here: whether they exist turns out when
    they are read.

    Args:
        left_out: counts the files in searched folders that are no images, and masks.

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
        raise LayoutError(f"{shown(root)} does not exist; give the folder of a dataset")
    if root.is_file() and root.suffix.lower() not in (".csv", ".tsv"):
        raise LayoutError(f"{root} is a file; give the folder of a dataset, or a CSV table")
    if root.is_file() and layout not in ("auto", "table"):
        raise LayoutError(f"{root} is a file; the layout {layout!r} needs a folder")
    try:
        name, base = _recognise(root) if layout == "auto" else (layout, _base(root, layout))
        records = list(LAYOUTS[name][1](base, left_out or LeftOut()))
    except (OSError, TableError) as error:
        raise LayoutError(f"{root} cannot be listed: {error}") from error
    if not records:
        raise LayoutError(f"no images in the layout {name!r}: {_inventory(root)}")
    return _each_once(records)


def _recognise(root: Path) -> tuple[str, Path]:
    """The name of the layout, and the folder that has it: ``root``, or the only one in it."""
    folder: Path | None = root
    while folder:
        for name, (fits, _) in LAYOUTS.items():
            if (name != "flat" or folder is root) and fits(folder):
                return name, folder
        folder = _only_folder(folder)
    raise LayoutError("\n".join(_refusal(root)))


def _base(root: Path, layout: str) -> Path:
    """The folder that has a layout asked for by name; ``root`` if none has."""
    folder: Path | None = root if layout != "flat" else None
    while folder:
        if LAYOUTS[layout][0](folder):
            return folder
        folder = _only_folder(folder)
    return root


def _only_folder(root: Path) -> Path | None:
    """The folder that an archive was unpacked into, if nothing else is there but notes on it."""
    folders = list(subfolders(root).values())
    if len(folders) != 1:
        return None
    return None if any(p.suffix.lower() in IMAGE_SUFFIXES for p in _files(root)) else folders[0]


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if not p.is_dir() and not is_passed_over(p.name)]


def _refusal(root: Path) -> Iterator[str]:
    """Sentences on what was found and what keeps layouts from fitting."""
    place = root
    while (inner := _only_folder(place)) and not _files(place) and inner.name.lower() not in SPLITS:
        place = inner
    yield f"no known layout fits {_inventory(place)}."
    folders = subfolders(place)
    for inner in folders.values():
        if name := next((n for n, (fits, _) in LAYOUTS.items() if n != "flat" and fits(inner)), ""):
            yield f"The layout {name!r} fits {inner}: give that folder."
    for name, inner in folders.items():
        if name in SPLITS and (classes := list(subfolders(inner))):
            yield (
                f"Of {enumerated(classes, 'folders')} in {inner} none is called NORMAL, which "
                "the layout 'archive' needs."
            )
            break
    for path in csv_files(place):
        header = ", ".join(columns(path)) or "no columns"
        yield f"{path.name} has {header}; a table has image_path, and label for labels."
    if root.is_dir():
        reason = why_not_flat(place) or why_not_flat(root)
        yield f"It is not taken for a flat folder of images of one kind: {reason}."
    yield (
        f"Known are {', '.join(LAYOUTS)}; for example train/NORMAL and test/PNEUMONIA folders, a "
        "CSV with the columns image_path and label, or a folder of images. The layout 'flat', if "
        "asked for, takes images without labels, whatever the folders are called."
    )


def _each_once(records: list[Record]) -> list[Record]:
    """Sort records by path, each once; refuse an image with two labels or splits, links followed.

    Two links to one image in the same split are two records, and so is a "val" that is "test".
    """
    known: dict[Path, Record] = {}
    files: dict[str, Record] = {}
    folders: dict[Path, str] = {}
    for record in records:
        first = known.setdefault(record.path, record)
        folder, name = record.path.parent, record.path.name
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        real = os.path.join(folders[folder], name)
        if os.path.islink(real):
            real = os.path.realpath(real)
        twin = files.setdefault(real, record)
        if first != record or twin.label != record.label or _trains(twin) != _trains(record):
            same = "" if twin.path == record.path else f", which is {twin.path} by a link,"
            raise LayoutError(
                f"{record.path}{same} is listed twice: with label {twin.label} in split "
                f"{twin.split} and with label {record.label} in split {record.split}; an image has "
                "one of each"
            )
    return sorted(known.values(), key=lambda record: record.path.as_posix())


def _trains(record: Record) -> bool:
    return record.split in ("train", None)


def _inventory(root: Path) -> str:
    if root.is_file():
        return f"{root} (a file)"
    folders = [path.name for path in subfolders(root).values()]
    files = sorted(path.name for path in _files(root))
    return f"{shown(root)} holds {enumerated(folders, 'folders')} and {enumerated(files, 'files')}"


LAYOUTS: dict[str, Layout] = {**FOLDER_LAYOUTS, **TABLE_LAYOUTS, "flat": FLAT}
"""Layouts by name, in the order in which they are tried."""
