"""Layouts in which the names of folders say what the images in them are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..utils.text import words
from .formats import IMAGE_SUFFIXES
from .listing import LeftOut, images_in, is_passed_over
from .records import ANOMALOUS, NORMAL, SPLITS, Layout, LayoutError, Record, enumerated

_NORMAL = {
    "normal", "normals", "healthy", "good", "ok", "nofinding", "nofindings", "notumor",
    "gesund", "gezond", "normaal", "normale", "normales", "normaux", "sain", "sains", "sani",
    "sano", "sanos", "正常", "норма",
}  # fmt: skip
_NEGATIONS = {"ab", "no", "non", "not", "un"}
ANOMALOUS_WORDS = {
    "abnormal", "abnormals", "anomalies", "anomalous", "anomaly", "bacteria", "bacterial", "bad",
    "cancer", "cardiomegaly", "covid", "defect", "defective", "defects", "disease", "diseased",
    "edema", "effusion", "fracture", "fractures", "infected", "krank", "lesion", "lesions",
    "nodule", "nodules", "pathological", "pathology", "pneumonia", "pneumothorax", "sick", "tb",
    "tuberculosis", "tumor", "tumour", "unhealthy", "viral", "virus",
}  # fmt: skip
_UNSURE = {"uncertain", "unclear", "unknown", "unlabeled", "unlabelled", "unsure"}
_MASKS = {
    "mask", "masks", "groundtruth", "gt", "annotation", "annotations", "seg", "segmentation",
    "segmentations", "heatmap", "heatmaps", "overlay", "overlays",
}  # fmt: skip
_SILENT = {
    "batch", "case", "cases", "chest", "chunk", "cxr", "data", "dataset", "dcm", "dicom", "dicoms",
    "file", "files", "folder", "frames", "hospital", "image", "images", "img", "imgs", "jpeg",
    "jpg", "lung", "lungs", "part", "pat", "patient", "patients", "png", "radiograph",
    "radiographs", "ray", "rays", "room", "scan", "scans", "se", "ser", "series", "ses", "session",
    "set", "site", "st", "studies", "study", "sub", "subject", "subjects", "tif", "tiff", "visit",
    "ward", "xray", "xrays", "year",
}  # fmt: skip
_TABLES = {".csv", ".tsv", ".xls", ".xlsx", ".ods", ".json", ".jsonl", ".parquet"}
_OF_LABELS = SPLITS.keys() | _MASKS | {
    "class", "classes", "diagnoses", "diagnosis", "findings", "label", "labels", "metadata",
    "split", "splits", "targets",
}  # fmt: skip
_HASH = re.compile(r"[0-9a-f]{8,}", re.IGNORECASE)


def authors(root: Path, left_out: LeftOut) -> Iterator[Record]:
    """The published code's: ``{split}/normal_256`` and ``pneumonia_256`` or ``abnormal_256``.

    A folder counts as a split by the first part of its name (``valid_256_pa`` is "val").
    """
    labels = {"normal_256": NORMAL, "pneumonia_256": ANOMALOUS, "abnormal_256": ANOMALOUS}
    for split, classes in _author_splits(root):
        for name, label in labels.items():
            if name in classes:
                yield from (Record(p, label, split) for p in _images_of(classes[name], left_out))


def _author_splits(root: Path) -> Iterator[tuple[str, dict[str, Path]]]:
    for name, folder in subfolders(root).items():
        split = SPLITS.get(name.split("_")[0])
        classes = subfolders(folder) if split else {}
        if split and "normal_256" in classes:
            yield split, classes


def archive(root: Path, left_out: LeftOut) -> Iterator[Record]:
    """``{train,val,test}/NORMAL`` or NORMAL alone, and other class folders beside it.

    These are anomalous, whatever they are called, unless their name leaves it open ("unlabelled",
    "images", "normal - copy"), which is refused. In a class folder there may be folders again,
    also one for each split. Folders of masks are left out, and files that are called like an image
    beside them but for "mask" before or behind it. Upper and lower case are the same.
    """
    if not _fits_archive(root):
        raise LayoutError(
            f"{root} has no class folder called NORMAL; it or its folders train, val and test "
            "need one"
        )
    splits = _splits(root)
    if not splits:
        yield from _classes(root, None, left_out)
    for folder in splits.values():
        yield from _classes(folder, _split_of(folder.name), left_out)


def _classes(folder: Path, split: str | None, left_out: LeftOut) -> Iterator[Record]:
    classes = subfolders(folder)
    if loose := _loose_images(folder):
        raise LayoutError(
            f"{folder} holds {enumerated(loose, 'images')} "
            f"{'beside' if classes else 'and no'} class folders; put them into one of these, such "
            "as NORMAL"
        )
    if numbers := [name for name in classes if name.isdigit()]:
        raise LayoutError(
            f"{folder} has class folders that are called by {enumerated(numbers, 'numbers')}; "
            "which of them is normal? Call that one NORMAL and the others by what they show"
        )
    for inner in classes.values():
        label = _label(inner.name)
        if label is None:
            raise LayoutError(
                f"{inner} would be a class folder, but its name leaves open whether what it holds "
                "is normal; call it NORMAL, or by what it shows, or move it elsewhere"
            )
        parts = {} if split or _is_masks(inner.name) else _splits(inner)
        if parts and (len(parts) < len(subfolders(inner)) or _loose_images(inner)):
            raise LayoutError(
                f"{inner} holds {enumerated(sorted(parts), 'splits')} and other images beside; "
                "put these into one of the splits"
            )
        for part_folder in parts.values() or [inner]:
            own = _split_of(part_folder.name) if parts else split
            for path in _images_of(part_folder, left_out):
                _check_between(path.relative_to(part_folder), part_folder, label)
                yield Record(path, label, own)


def _check_between(path: Path, folder: Path, label: int) -> None:
    """Refuse folders inside a class folder whose names speak of splits or another class."""
    for name in path.parts[:-1]:
        other = _is_normal(name) if label == ANOMALOUS else _is_anomalous(name)
        if other or _split_of(name):
            kind = "normal" if label == NORMAL else "anomalous"
            raise LayoutError(
                f"{folder} would be a class folder of {kind} images, but holds {path}; give a "
                "folder with splits, or one with class folders, and nothing else in it"
            )


def flat(root: Path, left_out: LeftOut) -> Iterator[Record]:
    """Any folder of images, searched with all folders in it; labels and splits unknown."""
    return (Record(path, None, None) for path in files_under(root, left_out))


def _fits_authors(root: Path) -> bool:
    return any(True for _ in _author_splits(root))


def _fits_archive(root: Path) -> bool:
    folders = _splits(root).values() or [root]
    return any(_is_normal(path.name) for folder in folders for path in subfolders(folder).values())


def _fits_flat(root: Path) -> bool:
    return root.is_dir() and not why_not_flat(root)


def why_not_flat(root: Path) -> str:
    """Why images under ``root`` may not all be of one unknown kind; "" if nothing says so.

    The names of folders and files, a table beside the images or masks may hold labels, and to
    train on all images as normal ones would be wrong then.
    """
    left_out = LeftOut()
    images = [path.relative_to(root) for path in files_under(root, left_out)]
    if not images:
        return f"{root} holds no images"
    if odd := _from_windows(images):
        return odd
    folders = dict.fromkeys(part for path in images for part in path.parts[:-1])
    if speaking := [name for name in folders if not _is_silent(name)]:
        return f"the names of {enumerated(speaking, 'folders')} may be labels or splits"
    stems = {path.stem.lower() for path in images}
    others = [Path(os.path.relpath(path.removesuffix(".gz"), root)) for path in left_out.paths]
    tables = [
        path for path in others if path.suffix.lower() in _TABLES and path.stem.lower() not in stems
    ]
    for noun, paths in (("tables", tables), ("files", filter(_speaks_of_labels, others))):
        if named := sorted(path.name for path in paths):
            return f"{enumerated(named, noun)} may hold labels"
    if masks := [path.name for path in images if _is_mask(path.stem.lower(), stems)]:
        return f"{enumerated(masks, 'files')} may be masks"
    normal = [name for name in stems if not _NORMAL.isdisjoint(words(name))]
    if 0 < len(normal) < len(stems):
        return f"{len(normal)} of {len(stems)} images are called normal and the others are not"
    if named := sorted(name for name in stems.difference(normal) if _is_anomalous(name)):
        return f"the names of {enumerated(named, 'images')} speak of anomalies"
    if len(splits := {split for name in stems for split in _splits_in(name)}) > 1:
        return f"the names of files speak of {enumerated(sorted(splits), 'splits')}"
    ends = [re.fullmatch(r"(.+)_([01])", name) for name in stems]
    found = [(end[1], end[2]) for end in ends if end]
    alone = len(found) == len(dict(found))
    if alone and len(found) > len(stems) / 2 and len(set(dict(found).values())) == 2:
        return f"the names of {len(found)} images end in _0 or _1, which may be labels"
    return ""


def _from_windows(images: Iterable[Path]) -> str:
    """What is wrong with files whose names hold the backslashes of Windows; "" if none does."""
    odd = [path.name for path in images if "\\" in path.name and os.sep != "\\"]
    if not odd:
        return ""
    return (
        f"{odd[0]!r} is a file whose name holds backslashes, which were folders on Windows; "
        "unpack the archive again with a program that makes folders of them, such as 7-Zip or "
        "python -m zipfile"
    )


def _speaks_of_labels(path: Path) -> bool:
    return any(not _OF_LABELS.isdisjoint(words(part)) for part in (*path.parts[:-1], path.stem))


def files_under(folder: Path, left_out: LeftOut | None = None) -> Iterator[Path]:
    """The images in a folder and in all folders in it, see ``images_in``.

    Raises:
        LayoutError: a folder cannot be listed.
    """
    for path, kind in images_in(str(folder), left_out):
        if kind == "unlisted":
            raise LayoutError(f"{path} is a folder that cannot be listed; you may not read it")
        if kind == "file":
            yield Path(path)


def subfolders(folder: Path) -> dict[str, Path]:
    """Folders by their name in lower case, without those that ``images_in`` passes over.

    Raises:
        LayoutError: two differ in case alone.
    """
    if not folder.is_dir():
        return {}
    folders: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not is_passed_over(path.name) and path.is_dir():
            twin = folders.setdefault(path.name.lower(), path)
            if twin is not path:
                raise LayoutError(f"{twin} and {path} differ in case alone; one of them has to go")
    return folders


def _splits(root: Path) -> dict[str, Path]:
    return {name: path for name, path in subfolders(root).items() if _split_of(path.name)}


def _split_of(name: str) -> str | None:
    """The split that the name of a folder stands for.

    >>> [_split_of(name) for name in ("Training set", "test_images", "NORMAL")]
    ['train', 'test', None]
    """
    return SPLITS.get("".join(_spoken(name)))


def _splits_in(name: str) -> set[str]:
    return {SPLITS[word] for word in words(name) if word in SPLITS}


def _loose_images(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if _has_suffix(path))


def _has_suffix(path: Path) -> bool:
    named = path.suffix.lower() in IMAGE_SUFFIXES and not is_passed_over(path.name)
    return named and not path.is_dir()


def _images_of(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """The images of a class, without masks."""
    listed = list(files_under(folder, left_out))
    if odd := _from_windows(listed):
        raise LayoutError(odd)
    stems: dict[Path, set[str]] = {}
    for path in listed:
        stems.setdefault(path.parent, set()).add(path.stem.lower())
    for path in listed:
        inner = path.relative_to(folder.parent).parts[:-1]
        if any(map(_is_masks, inner)) or _is_mask(path.stem.lower(), stems[path.parent]):
            left_out.add(path, "masks")
        else:
            yield path


def _spoken(name: str) -> list[str]:
    """The words in a name that say something."""
    return [word for word in words(name) if word.isalpha() and word not in _SILENT]


def _label(name: str) -> int | None:
    """The label of what is in a class folder; None if its name leaves it open.

    >>> [_label(name) for name in ("Normal cases", "COVID", "not normal", "Normal - Copy")]
    [0, 1, 1, None]
    """
    if _is_normal(name):
        return NORMAL
    spoken = _spoken(name)
    if not spoken or not _UNSURE.isdisjoint(spoken) or _splits_in(name):
        return None
    negated = not _NEGATIONS.isdisjoint(spoken)
    if not _NORMAL.isdisjoint(spoken):
        return ANOMALOUS if negated else None
    return None if negated and _is_anomalous(name) else ANOMALOUS


def _is_normal(name: str) -> bool:
    return "".join(_spoken(name)) in _NORMAL


def _is_anomalous(name: str) -> bool:
    return not ANOMALOUS_WORDS.isdisjoint(words(name))


def _is_masks(name: str) -> bool:
    parts = words(name)
    return not _MASKS.isdisjoint(parts) or "".join(parts) in _MASKS


def _is_mask(stem: str, stems: set[str]) -> bool:
    """Whether a file is called like another one in its folder with "mask" at either end."""
    base = re.sub(r"[-_ ](mask|gt|seg|segmentation)([-_ ]?\d+)?$|^(mask|gt|seg)[-_ ]", "", stem)
    return base != stem and base in stems


def _is_silent(name: str) -> bool:
    """Whether the name of a folder says nothing of what its images show."""
    if _HASH.fullmatch(name):
        return True
    parts = words(name)
    digits = sum(len(word) for word in parts if word.isdigit())
    letters = [word for word in parts if word.isalpha()]
    if not letters:
        return digits > 2  # 0 and 1 may be labels
    spoken = [word for word in letters if word not in _SILENT]
    alone = len(spoken) == len(letters)
    return all(len(word) == 1 and (not alone or word in "ps") for word in spoken) and (
        not alone or digits > 1
    )


FOLDER_LAYOUTS: dict[str, Layout] = {
    "authors": (_fits_authors, authors),
    "archive": (_fits_archive, archive),
}
"""Layouts with labels by name, in the order in which they are tried."""

FLAT: Layout = (_fits_flat, flat)
