"""Layouts that read which images there are, and what is known of each, from lists."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import posixpath
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..utils.text import decoded, spellings, words
from .csv_files import PATH_COLUMNS, Table, TableError
from .folders import ANOMALOUS_WORDS, files_under
from .listing import LeftOut
from .records import ANOMALOUS, NORMAL, SPLITS, Layout, LayoutError, Record, enumerated

_HEAD = 1 << 16  # bytes in which the header of a table is looked for
_LIKE_LABELS = ANOMALOUS_WORDS | {
    "atelectasis", "category", "class", "classes", "condition", "diagnoses", "finding", "findings",
    "diagnosis", "ground", "gt", "label", "labels", "normal", "outcome", "status", "target",
    "truth", "y",
}  # fmt: skip
_LABELS = {
    **dict.fromkeys(("0", "0.0", "normal"), NORMAL),
    **dict.fromkeys(("1", "1.0", "abnormal", "anomaly", "anomalous"), ANOMALOUS),
}


def medianomaly(root: Path, left_out: LeftOut) -> Iterator[Record]:
    """The benchmark MedIAnomaly: ``images/`` and ``data.json``.

    The JSON maps "train", "test" (and perhaps "val") to lists of file names by class:
    ``{"train": {"0": [...]}, "test": {"0": [...], "1": [...]}}``. Instead of "0" and "1" it may
    say "normal" and "abnormal", "anomaly" or "anomalous"; a bare list is normal. The pool
    ``train.unlabeled`` that some of its datasets carry, by class as well, becomes the split
    "unlabeled" and keeps the labels that the JSON gives.
    """
    table = root / "data.json"
    try:
        content = json.loads(table.read_bytes())
    except ValueError as error:
        raise LayoutError(f"{table} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not set(content) & set(SPLITS):
        raise LayoutError(f"{table} has no 'train' or 'test' on its first level")
    for key, classes in content.items():
        if key not in SPLITS:
            continue
        pool = classes.get("unlabeled") if isinstance(classes, dict) else None
        if pool is not None:
            classes = {name: names for name, names in classes.items() if name != "unlabeled"}
            yield from _by_class(root, pool, "unlabeled", f"{table}, {key}.unlabeled")
        yield from _by_class(root, classes, SPLITS[key], f"{table}, {key}")


def _by_class(root: Path, classes: Any, split: str, origin: str) -> Iterator[Record]:
    by_name = {"normal": classes} if isinstance(classes, list) else classes
    if not isinstance(by_name, dict):
        raise LayoutError(f"{origin} is {type(classes).__name__}; lists of file names are needed")
    for name, files in by_name.items():
        label = _LABELS.get(name.lower())
        if label is None or not isinstance(files, list):
            raise LayoutError(f"{origin} holds {name!r}; 0 and 1 with lists of file names are read")
        for file in files:
            yield Record(_inside(root / "images", str(file), origin), label, split)


def _fits_medianomaly(root: Path) -> bool:
    return (root / "data.json").is_file() and (root / "images").is_dir()


_CHEXPERT_COLUMNS = {"path", "frontal/lateral", "no finding"}


def chexpert(root: Path, left_out: LeftOut) -> Iterator[Record]:
    """CheXpert: ``train.csv`` and ``valid.csv`` with Path, Frontal/Lateral and No Finding.

    Frontal images only. "No Finding" 1 is normal, everything else anomalous. All rows of
    ``valid.csv`` are the split "test". The patients of ``train.csv`` are divided by a hash of
    their number: a tenth "val", and where ``valid.csv`` has no frontal images another tenth
    "test"; the rest, normal and anomalous, is "train". No patient is in two splits: one who is in
    both files is wholly in "test". Paths may begin with the dataset's own folder name.
    """
    train, valid = root / "train.csv", root / "valid.csv"
    tables = {train: _chexpert_rows(train), valid: _chexpert_rows(valid)}
    tested = {_patient(row["path"], valid) for row in tables[valid]}
    for table, rows in tables.items():
        if not rows:
            continue
        paths = [row["path"] for row in rows]
        if not any((root / path).is_file() for path in paths):
            paths = [path.partition("/")[2] or path for path in paths]
            _first_that_holds([root], paths, table)
        for path, row in zip(paths, rows, strict=True):
            label = NORMAL if row["no finding"].strip() in ("1", "1.0") else ANOMALOUS
            patient = _patient(path, table)
            split = "test" if patient in tested else _patient_split(patient, not tested)
            yield Record(_inside(root, path, str(table)), label, split)


def _chexpert_rows(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        return []
    if missing := _CHEXPERT_COLUMNS - set(columns(table)):
        raise LayoutError(f"{table} lacks the columns {', '.join(sorted(missing))}")
    rows = _read(table, _CHEXPERT_COLUMNS)
    return [row for row in rows if row["frontal/lateral"].strip().lower() == "frontal"]


def _patient(path: str, table: Path) -> str:
    if match := re.search(r"patient\d+", path):
        return match.group()
    raise LayoutError(f"{table} names {path!r}, which contains no patient number (patient00001)")


def _patient_split(patient: str, with_test: bool) -> str:
    share = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
    if share < 0.1:
        return "val"
    return "test" if with_test and share < 0.2 else "train"


def _fits_chexpert(root: Path) -> bool:
    tables = [root / name for name in ("train.csv", "valid.csv")]
    return any(path.is_file() and set(columns(path)) >= _CHEXPERT_COLUMNS for path in tables)


_COVIDX_LIST = re.compile(r"(train|val|valid|test)(_(covidx|split).*)?\.txt", re.IGNORECASE)
_COVIDX_LINE = re.compile(
    r"\S+\s+(?P<file>\S.*?\.(png|jpe?g|bmp|tiff?|gif|webp|dcm))\s+(?P<label>\S+)(\s+.*)?",
    re.IGNORECASE,
)


def covidx(root: Path, left_out: LeftOut) -> Iterator[Record]:
    """COVIDx: one text list per split with lines ``patient filename label [source]``.

    "normal" is normal, every other label anomalous. Of lists that tell COVID-19 ("positive") from
    everything else ("negative"), "negative" is read as normal with a warning, since it includes
    other diseases. The images are in ``train/``, ``val/``, ``test/`` or in the folder itself.
    """
    binary = False
    for split, table in _covidx_lists(root).items():
        entries = [_covidx_entry(table, number, line) for number, line in _lines(table)]
        if not entries:
            continue
        own_word = re.split("[_.]", table.name.lower())[0]  # "valid", where the split is "val"
        folders = list(dict.fromkeys([root / own_word, root / split, root]))
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
        split = SPLITS[match.group(1).lower()]
        if split in lists:
            raise LayoutError(
                f"{lists[split]} and {path.name} both list the split {split!r}; keep one version "
                "of the lists in the folder"
            )
        lists[split] = path
    return lists


def _covidx_entry(table: Path, number: int, line: str) -> tuple[str, str]:
    if match := _COVIDX_LINE.fullmatch(line):
        return match["file"], match["label"].lower()
    raise LayoutError(
        f"{table}, line {number} is {line[:80]!r}; 'patient filename label source' is read"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(decoded(path.read_bytes()).split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _fits_covidx(root: Path) -> bool:
    if not root.is_dir():
        return False
    lists = [p for p in root.iterdir() if _COVIDX_LIST.fullmatch(p.name) and p.is_file()]
    first_lines = [line for path in lists for _, line in itertools.islice(_lines(path), 1)]
    return any(_COVIDX_LINE.fullmatch(line) for line in first_lines)


_NIH_COLUMNS = {"image index", "finding labels"}
_NIH_LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}


def nih(root: Path, left_out: LeftOut) -> Iterator[Record]:
    """ChestX-ray14 of the NIH: a CSV with Image Index and Finding Labels, and images in folders.

    "No Finding" is normal, everything else anomalous. The images that are there are listed, in
    whatever folders they lie; those of ``train_val_list.txt`` are "train" and those of
    ``test_list.txt`` "test", and without these lists no image has a split.
    """
    labels: dict[str, int] = {}
    tables = _needed(root, _NIH_COLUMNS)
    for table in tables:
        for row in _read(table, _NIH_COLUMNS):
            name, findings = row["image index"].strip(), row["finding labels"].strip().lower()
            label = NORMAL if findings == "no finding" else ANOMALOUS
            if labels.setdefault(name, label) != label:
                raise LayoutError(
                    f"{table} gives {name} other findings than {tables[0].name}; keep one of them"
                )
    lists = {root / name: split for name, split in _NIH_LISTS.items() if (root / name).is_file()}
    splits = {line: split for path, split in lists.items() for _, line in _lines(path)}
    for name, path in _listed_images(root, labels, left_out, tables[0]).items():
        yield Record(path, labels[name], splits.get(name))


_RSNA_COLUMNS = {"patientid", "target"}
_RSNA_CLASSES = {"patientid", "class"}


def rsna(root: Path, left_out: LeftOut) -> Iterator[Record]:
    """RSNA's pneumonia challenge: a CSV with patientId and Target, and images named by patientId.

    They lie in a folder of a name that ends in ``train_images``; those of ``test_images`` are the
    split "test" and have no label. Target 1 is anomalous. Where the CSV with the ``class`` of each
    image is there, "Normal" is normal and everything else anomalous; without it Target 0 is taken
    as normal with a warning, since it includes other diseases.
    """
    table = _needed(root, _RSNA_COLUMNS)[0]
    classes = _with_columns(root, _RSNA_CLASSES)
    labels: dict[str, int] = {}
    source, needed = (classes[0], _RSNA_CLASSES) if classes else (table, _RSNA_COLUMNS)
    for row in _read(source, needed):
        name, value = row["patientid"].strip(), row["class" if classes else "target"].strip()
        normal = value.lower() == "normal" if classes else value in ("0", "0.0")
        labels[name] = max(labels.get(name, NORMAL), NORMAL if normal else ANOMALOUS)
    if not classes:
        warnings.warn(
            f"{root} tells pneumonia from its absence: Target 0 is taken as normal, though it "
            "includes other diseases",
            stacklevel=2,
        )
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name.lower().endswith("train_images"):
            for name, path in _listed_images(folder, labels, left_out, table).items():
                yield Record(path, labels[name], "train")
        elif folder.name.lower().endswith("test_images"):
            yield from (Record(path, None, "test") for path in files_under(folder, left_out))


def _listed_images(
    folder: Path, names: Collection[str], left_out: LeftOut, table: Path
) -> dict[str, Path]:
    """The images under ``folder`` that ``names`` name, with or without suffix, by these names."""
    found: dict[str, Path] = {}
    for path in sorted(files_under(folder, left_out)):
        name = path.name if path.name in names else path.stem
        if name not in names or name in found:
            left_out.add(path, "copies" if name in found else f"not in {table.name}")
        else:
            found[name] = path
    if not found:
        raise LayoutError(
            f"none of the {len(names)} images that {table} names, for example "
            f"{next(iter(names), '')!r}, lies under {folder}"
        )
    if len(found) < len(names):
        warnings.warn(
            f"{len(names) - len(found):,} of the {len(names):,} images that {table} names are not "
            f"under {folder}",
            stacklevel=2,
        )
    return found


def table(root: Path, left_out: LeftOut) -> Iterator[Record]:
    """A CSV with the column ``image_path`` and perhaps ``label`` and ``split``; others are ignored.

    Instead of ``image_path`` it may have another one of ``PATH_COLUMNS``. Without ``label``, a
    column that is called like labels is refused, and so is a table in the folder that may hold
    them, since all images would count as unlabelled. Without ``split``, a column of splits is.

    Paths are relative to the CSV's folder, which they may not leave through ``..``; absolute paths
    are taken as they are. A label is 0 or normal, 1 or abnormal (anomaly, anomalous), or empty for
    unknown. A split is any name or empty; "training", "valid" and the like become "train" and
    "val".
    """
    candidates = _tables(root)
    if len(candidates) != 1:
        found = enumerated([path.name for path in candidates], "tables")
        raise LayoutError(
            f"{root} is not a table and holds {found} with the column image_path; exactly one is "
            "needed, or its path"
        )
    source = candidates[0]
    content = Table.parse(source.read_bytes(), str(source))
    column = content.path_column
    _check_labels(root, source, content.header)
    _check_splits(content)
    for number, (_, row) in enumerate(content.rows(), start=1):
        name = row.get(column, "")
        label, split = (row.get(key, "").strip().lower() for key in ("label", "split"))
        origin = f"{source}, row {number}"
        if not name.strip():
            raise LayoutError(f"{origin} has no {column}")
        if label and label not in _LABELS:
            raise LayoutError(
                f"{origin} has the label {label!r}; 0, 1, normal, abnormal or nothing is read"
            )
        path = _inside(source.parent, name, origin)
        yield Record(path, _LABELS.get(label), SPLITS.get(split, split) or None)


def _check_labels(root: Path, source: Path, header: list[str]) -> None:
    """Refuse a table without labels where they seem to stand elsewhere."""
    if "label" in header:
        return
    if like_labels := sorted(name for name in header if _may_be_labels(name)):
        raise LayoutError(
            f"{source} has no column label, but {enumerated(like_labels, 'columns')} that "
            "may hold labels; call the column of labels label, with 0 or normal and 1 or abnormal"
        )
    if others := [path.name for path in csv_files(root) if path != source]:
        raise LayoutError(
            f"{source} has no column label, but beside it {enumerated(others, 'tables')} may hold "
            f"labels; add the column, or give {source.name} itself if its images are of one kind"
        )


def _may_be_labels(column: str) -> bool:
    named = words(column)
    return not _LIKE_LABELS.isdisjoint(named) and "score" not in named  # one of our own results


def _check_splits(content: Table) -> None:
    """Refuse a table without splits where another column holds nothing but these."""
    if "split" in content.header:
        return
    values: dict[str, set[str]] = {}
    for _, row in content.rows():
        for name, cell in row.items():
            values.setdefault(name, set()).add(cell.strip().lower())
    for name, found in values.items():
        if found <= SPLITS.keys() | {""} and found != {""}:
            raise LayoutError(
                f"{content.origin} has no column split, but its column {name!r} holds "
                f"{enumerated(sorted(found - {''}), 'splits')}; call it split"
            )


def _tables(root: Path) -> list[Path]:
    """Tables that name images; those with ``image_path`` if there are any."""
    files = [root] if root.is_file() else csv_files(root)
    for names in (PATH_COLUMNS[:1], PATH_COLUMNS[1:]):
        if found := [path for path in files if set(names) & set(columns(path))]:
            return found
    return []


def _needed(root: Path, names: set[str]) -> list[Path]:
    if tables := _with_columns(root, names):
        return tables
    raise LayoutError(f"{root} holds no CSV with the columns {' and '.join(sorted(names))}")


def _with_columns(root: Path, names: set[str]) -> list[Path]:
    return [path for path in csv_files(root) if names <= set(columns(path))]


def csv_files(root: Path) -> list[Path]:
    """The CSV tables in a folder."""
    found = sorted(root.glob("*.[cCtT][sS][vV]")) if root.is_dir() else []
    return [path for path in found if path.is_file()]


def _inside(folder: Path, name: str, origin: str) -> Path:
    """A listed path relative to its folder; absolute ones are taken as they are."""
    name = next((other for other in spellings(name) if os.path.lexists(folder / other)), name)
    if not posixpath.isabs(name) and posixpath.normpath(name).split("/")[0] == "..":
        raise LayoutError(
            f"{origin} names {name!r}, which lies outside of {folder}; paths must stay in it"
        )
    return folder / posixpath.normpath(name)


def _first_that_holds(folders: Sequence[Path], names: Sequence[str], origin: Path) -> Path:
    """The first folder in which any of the named files exists."""
    for name in names:
        for folder in folders:
            if any((folder / other).is_file() for other in spellings(name)):
                return folder
    places = " or ".join(str(folder) for folder in folders)
    raise LayoutError(
        f"none of the {len(names)} images that {origin} names, for example "
        f"{names[0]!r}, lies under {places}"
    )


def _read(path: Path, needed: set[str]) -> list[dict[str, str]]:
    """The rows of a table, in which no row may be too short for the ``needed`` columns."""
    rows = []
    for line, row in Table.parse(path.read_bytes(), str(path)).rows():
        if missing := needed - row.keys():
            raise LayoutError(
                f"{path}, line {line} is too short: it lacks {', '.join(sorted(missing))}"
            )
        rows.append(row)
    return rows


def columns(path: Path) -> list[str]:
    """The columns of a CSV table, in lower case; none if it is no table."""
    try:
        with open(path, "rb") as file:
            return Table.parse(file.read(_HEAD), str(path)).header
    except TableError:
        return []


TABLE_LAYOUTS: dict[str, Layout] = {
    "medianomaly": (_fits_medianomaly, medianomaly),
    "chexpert": (_fits_chexpert, chexpert),
    "covidx": (_fits_covidx, covidx),
    "nih": (lambda root: bool(_with_columns(root, _NIH_COLUMNS)), nih),
    "rsna": (lambda root: bool(_with_columns(root, _RSNA_COLUMNS)), rsna),
    "table": (lambda root: bool(_tables(root)), table),
}
"""Layouts by name, in the order in which they are tried."""
