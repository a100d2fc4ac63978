"""Where a dataset's images lie and what is known of them.

Every layout is one small function from a folder (or table) to records; :func:`find_records`
recognises which one fits.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import posixpath
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squid_fast.data.readers import IMAGE_SUFFIXES, is_dicom

NORMAL, ANOMALOUS = 0, 1

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_LABEL_NAMES = {
    **dict.fromkeys(("0", "0.0", "normal"), NORMAL),
    **dict.fromkeys(("1", "1.0", "abnormal", "anomaly", "anomalous"), ANOMALOUS),
}


class LayoutError(ValueError):
    """A dataset is not laid out in a known way; the message says what was found."""


@dataclass(frozen=True)
class Record:
    """One image of a dataset.

    Attributes:
        path: the image file.
        label: 0 normal, 1 anomalous, None unknown.
        split: "train", "val", "test" or another name that the dataset uses; None if it has none.
    """

    path: Path
    label: int | None
    split: str | None


def find_records(root: str | os.PathLike[str], layout: str = "auto") -> list[Record]:
    """List the images of a dataset.

    The layouts, in the order in which ``"auto"`` tries them:

    - ``authors``: ``{split}/normal_256`` and ``{split}/pneumonia_256`` or ``abnormal_256``, as in
      the published code. A folder counts as a split by the first part of its name
      (``valid_256_pa`` is "val").
    - ``archive``: ``{train,val,test}/NORMAL``, and any other class folder beside it is anomalous
      (``PNEUMONIA``). Upper and lower case are the same.
    - ``medianomaly``: ``images/`` and ``data.json``, see :func:`_medianomaly`.
    - ``chexpert``: ``train.csv`` and perhaps ``valid.csv``, see :func:`_chexpert`.
    - ``covidx``: ``train.txt``, ``val.txt``, ``test.txt`` or ``train_COVIDx9A.txt`` and the like,
      see :func:`_covidx`.
    - ``table``: a CSV, or a folder with exactly one such CSV, see :func:`_table`.
    - ``flat``: any folder of images, searched recursively; labels and splits unknown.

    A split may be absent. Files that a list names are not opened here: reading tells whether
    they are there.

    Args:
        root: the dataset's folder, or the CSV of a ``table``.
        layout: "auto" or one of ``LAYOUTS``.

    Returns:
        the records, each image once, sorted by path.

    Raises:
        LayoutError: nothing is there, no layout fits, or one image is listed with two labels or in
            two splits.
        ValueError: ``layout`` is not a known name.
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


def select(
    records: Iterable[Record], split: str | None = None, label: int | None = None
) -> list[Record]:
    """The records of one split, of one label, or both; None means any."""
    return [
        record
        for record in records
        if (split is None or record.split == split) and (label is None or record.label == label)
    ]


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
    """What a folder holds, for error messages."""
    if root.is_file():
        return f"{root} (a file)"
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if not entry.is_dir()]
    return f"{root} holds {_some(folders, 'folders')} and {_some(files, 'files')}"


def _some(names: Sequence[str], noun: str) -> str:
    if not names:
        return f"no {noun}"
    return f"{len(names)} {noun} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def _images_under(folder: Path) -> Iterator[Path]:
    """Image files by suffix, and DICOM files that have none (or a UID for a name)."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        for name in files:
            path = Path(parent, name)
            suffix = path.suffix.lower()
            if _hidden(name):
                continue
            if suffix in IMAGE_SUFFIXES or (not suffix.strip(".0123456789") and is_dicom(path)):
                yield path


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _subfolders(folder: Path) -> dict[str, Path]:
    """Folders by their name in lower case."""
    if not folder.is_dir():
        return {}
    entries = sorted(folder.iterdir())
    return {path.name.lower(): path for path in entries if path.is_dir() and not _hidden(path.name)}


def _inside(folder: Path, name: str, origin: str) -> Path:
    """A listed path relative to its folder; absolute ones are taken as they are."""
    if not posixpath.isabs(name) and posixpath.normpath(name).split("/")[0] == "..":
        raise LayoutError(f"{origin} names {name!r}, which lies outside of {folder}; it may not")
    return folder / posixpath.normpath(name)


def _first_that_holds(folders: Sequence[Path], names: Sequence[str], origin: Path) -> Path:
    """The first folder in which any of the named files exists."""
    for name in names:
        for folder in folders:
            if (folder / name).is_file():
                return folder
    places = " or ".join(str(folder) for folder in folders)
    raise LayoutError(
        f"none of the {len(names)} images that {origin} names, for example "
        f"{names[0]!r}, lies under {places}"
    )


def _read_csv(path: Path) -> list[dict[str, str]]:
    """Rows with column names in lower case; a byte order mark is dropped."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        header = [name.strip().lower() for name in next(rows, [])]
        return [dict(zip(header, row, strict=False)) for row in rows if row]


def _columns(path: Path) -> list[str]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [name.strip().lower() for name in next(csv.reader(file), [])]
    except (UnicodeDecodeError, csv.Error):
        return []


def _author_splits(root: Path) -> Iterator[tuple[str, dict[str, Path]]]:
    for name, folder in _subfolders(root).items():
        split = _SPLITS.get(name.split("_")[0])
        classes = _subfolders(folder) if split else {}
        if split and "normal_256" in classes:
            yield split, classes


def _authors(root: Path) -> Iterator[Record]:
    for split, classes in _author_splits(root):
        for name, label in (
            ("normal_256", NORMAL),
            ("pneumonia_256", ANOMALOUS),
            ("abnormal_256", ANOMALOUS),
        ):
            if name in classes:
                yield from (Record(path, label, split) for path in _images_under(classes[name]))


def _fits_authors(root: Path) -> bool:
    return any(True for _ in _author_splits(root))


def _archive(root: Path) -> Iterator[Record]:
    for name, folder in _subfolders(root).items():
        if name not in _SPLITS:
            continue
        loose = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        if loose:
            raise LayoutError(
                f"{folder} holds {_some([path.name for path in loose], 'images')} beside its class "
                "folders; put them into one of these"
            )
        for class_name, class_folder in _subfolders(folder).items():
            label = NORMAL if class_name == "normal" else ANOMALOUS
            yield from (Record(path, label, _SPLITS[name]) for path in _images_under(class_folder))


def _fits_archive(root: Path) -> bool:
    return any(
        name in _SPLITS and "normal" in _subfolders(folder)
        for name, folder in _subfolders(root).items()
    )


def _medianomaly(root: Path) -> Iterator[Record]:
    """The benchmark MedIAnomaly: ``images/`` and ``data.json``.

    The JSON maps "train", "test" (and perhaps "val") to lists of file names by class:
    ``{"train": {"0": [...]}, "test": {"0": [...], "1": [...]}}``. Instead of "0" and "1" it may
    say "normal" and "abnormal", "anomaly" or "anomalous"; a bare list is normal. The pool
    ``train.unlabeled`` that some of its datasets carry, by class as well, becomes the split
    "unlabeled" and keeps the labels that the JSON gives.
    """
    table = root / "data.json"
    content = _json(table)
    if not isinstance(content, dict) or not set(content) & set(_SPLITS):
        raise LayoutError(f"{table} has no 'train' or 'test' on its first level")
    for key, classes in content.items():
        if key not in _SPLITS:
            continue
        pool = classes.get("unlabeled") if isinstance(classes, dict) else None
        if pool is not None:
            classes = {name: names for name, names in classes.items() if name != "unlabeled"}
            yield from _by_class(root, pool, "unlabeled", f"{table}, {key}.unlabeled")
        yield from _by_class(root, classes, _SPLITS[key], f"{table}, {key}")


def _by_class(root: Path, classes: Any, split: str, origin: str) -> Iterator[Record]:
    by_name: Mapping[str, Any] = {"normal": classes} if isinstance(classes, list) else classes
    if not isinstance(by_name, dict):
        raise LayoutError(f"{origin} is {type(classes).__name__}; lists of file names are needed")
    for name, files in by_name.items():
        label = _LABEL_NAMES.get(name.lower())
        if label is None or not isinstance(files, list):
            raise LayoutError(f"{origin} holds {name!r}; 0 and 1 with lists of file names are read")
        for file in files:
            yield Record(_inside(root / "images", str(file), origin), label, split)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LayoutError(f"{path} is not valid JSON: {error}") from error


def _fits_medianomaly(root: Path) -> bool:
    return (root / "data.json").is_file() and (root / "images").is_dir()


_CHEXPERT_COLUMNS = {"path", "frontal/lateral", "no finding"}


def _chexpert(root: Path) -> Iterator[Record]:
    """CheXpert: ``train.csv`` and ``valid.csv`` with Path, Frontal/Lateral and No Finding.

    Frontal images only. "No Finding" 1 is normal, everything else anomalous. All rows of
    ``valid.csv`` are the split "test". The patients of ``train.csv`` are divided by a hash of
    their number: a tenth "val", and where there is no ``valid.csv`` another tenth "test"; the rest,
    normal and anomalous, is "train". No patient is in two splits: one who is in both files is
    wholly in "test". Paths may begin with the dataset's own folder name.
    """
    rows = {name: _chexpert_rows(root / name) for name in ("train.csv", "valid.csv")}
    tested = {_patient(row["path"], root / "valid.csv") for row in rows["valid.csv"]}
    for name, table in rows.items():
        if not table:
            continue
        paths = [row["path"] for row in table]
        shortened = [path.partition("/")[2] or path for path in paths]
        if not any((root / path).is_file() for path in paths):
            _first_that_holds([root], shortened, root / name)
            paths = shortened
        for path, row in zip(paths, table, strict=True):
            label = NORMAL if row.get("no finding", "").strip() in ("1", "1.0") else ANOMALOUS
            patient = _patient(path, root / name)
            split = "test" if patient in tested else _patient_split(patient, not tested)
            yield Record(_inside(root, path, str(root / name)), label, split)


def _chexpert_rows(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        return []
    missing = _CHEXPERT_COLUMNS - set(_columns(table))
    if missing:
        raise LayoutError(f"{table} lacks the columns {', '.join(sorted(missing))}")
    rows = _read_csv(table)
    return [row for row in rows if row.get("frontal/lateral", "").strip().lower() == "frontal"]


def _patient(path: str, table: Path) -> str:
    match = re.search(r"patient\d+", path)
    if match is None:
        raise LayoutError(f"{table} names {path!r}, in which no patient number (patient00001) is")
    return match.group()


def _patient_split(patient: str, with_test: bool) -> str:
    share = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
    if share < 0.1:
        return "val"
    return "test" if with_test and share < 0.2 else "train"


def _fits_chexpert(root: Path) -> bool:
    tables = [root / name for name in ("train.csv", "valid.csv")]
    return any(path.is_file() and set(_columns(path)) >= _CHEXPERT_COLUMNS for path in tables)


_COVIDX_LIST = re.compile(r"(train|val|valid|test)(_(covidx|split).*)?\.txt", re.IGNORECASE)
_COVIDX_LINE = re.compile(
    r"\S+\s+(?P<file>\S.*?\.(png|jpe?g|bmp|tiff?|gif|webp|dcm))\s+(?P<label>\S+)(\s+.*)?",
    re.IGNORECASE,
)


def _covidx(root: Path) -> Iterator[Record]:
    """COVIDx: one text list per split with lines ``patient filename label [source]``.

    "normal" is normal, every other label anomalous. The lists that tell COVID-19 ("positive")
    from everything else ("negative") are read with "negative" as normal, and a warning, for it
    includes other diseases. The images lie in ``train/``, ``val/``, ``test/`` or in the folder
    itself.
    """
    binary = False
    for split, table in _covidx_lists(root).items():
        entries = [_covidx_entry(table, number, line) for number, line in _lines(table)]
        if not entries:
            continue
        stem = _COVIDX_LIST.fullmatch(table.name)
        folders = [root / (stem.group(1).lower() if stem else split), root / split, root]
        base = _first_that_holds(folders, [name for name, _ in entries], table)
        for name, label in entries:
            binary = binary or label == "negative"
            known = NORMAL if label in ("normal", "negative") else ANOMALOUS
            yield Record(_inside(base, name, str(table)), known, split)
    if binary:
        warnings.warn(
            f"{root} tells COVID-19 from its absence: 'negative' is taken as normal, though it "
            "includes other diseases",
            stacklevel=2,
        )


def _covidx_lists(root: Path) -> dict[str, Path]:
    lists: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        match = _COVIDX_LIST.fullmatch(path.name)
        if match is None or not path.is_file():
            continue
        split = _SPLITS[match.group(1).lower()]
        if split in lists:
            raise LayoutError(
                f"{lists[split]} and {path.name} both list the split {split!r}; keep one version "
                "of the lists in the folder"
            )
        lists[split] = path
    return lists


def _covidx_entry(table: Path, number: int, line: str) -> tuple[str, str]:
    match = _COVIDX_LINE.fullmatch(line)
    if match is None:
        raise LayoutError(
            f"{table}, line {number} is {line[:80]!r}; 'patient filename label source' is read"
        )
    return match["file"], match["label"].lower()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.strip()


def _fits_covidx(root: Path) -> bool:
    if not root.is_dir():
        return False
    lists = [path for path in root.iterdir() if _COVIDX_LIST.fullmatch(path.name)]
    first_lines = [line for path in lists for _, line in list(_lines(path))[:1]]
    return any(_COVIDX_LINE.fullmatch(line) for line in first_lines)


def _table(root: Path) -> Iterator[Record]:
    """A CSV with the column ``image_path`` and perhaps ``label`` and ``split``; others are ignored.

    Paths are relative to the CSV's folder, which they may not leave through ``..``; absolute paths
    are taken as they are. A label is 0 or normal, 1 or abnormal (anomaly, anomalous), or empty for
    unknown. A split is any name or empty; "valid" and "validation" become "val".
    """
    table = _tables(root)[0] if len(_tables(root)) == 1 else None
    if table is None:
        raise LayoutError(
            f"{root} is not a table and holds {_some([t.name for t in _tables(root)], 'tables')} "
            "with the column image_path; exactly one is needed, or its path"
        )
    for number, row in enumerate(_read_csv(table), start=1):
        name = row.get("image_path", "").strip()
        label = row.get("label", "").strip().lower()
        split = row.get("split", "").strip().lower()
        origin = f"{table}, row {number}"
        if not name:
            raise LayoutError(f"{origin} has no image_path")
        if label and label not in _LABEL_NAMES:
            raise LayoutError(
                f"{origin} has the label {label!r}; 0, 1, normal, abnormal or nothing is read"
            )
        path = _inside(table.parent, name, origin)
        yield Record(path, _LABEL_NAMES.get(label), _SPLITS.get(split, split) or None)


def _tables(root: Path) -> list[Path]:
    files = [root] if root.is_file() else sorted(root.glob("*.[cC][sS][vV]"))
    return [path for path in files if path.is_file() and "image_path" in _columns(path)]


def _fits_table(root: Path) -> bool:
    return bool(_tables(root))


def _flat(root: Path) -> Iterator[Record]:
    return (Record(path, None, None) for path in _images_under(root))


def _fits_flat(root: Path) -> bool:
    """Folders called train or test without a NORMAL in them are a mistake rather than a heap."""
    if not root.is_dir() or any(name in _SPLITS for name in _subfolders(root)):
        return False
    return any(True for _ in _images_under(root))


LAYOUTS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Iterator[Record]]]] = {
    "authors": (_fits_authors, _authors),
    "archive": (_fits_archive, _archive),
    "medianomaly": (_fits_medianomaly, _medianomaly),
    "chexpert": (_fits_chexpert, _chexpert),
    "covidx": (_fits_covidx, _covidx),
    "table": (_fits_table, _table),
    "flat": (_fits_flat, _flat),
}
"""Layouts by name: whether a folder is laid out so, and its records."""
