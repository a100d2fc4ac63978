"""Each layout on a small folder of its kind, found by itself and by name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from squid_fast.data import LAYOUTS, LayoutError, Record, find_records, select
from squid_fast.data.listing import LeftOut
from squid_fast.data.records import overview


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def rows(records: Iterable[Record], root: Path) -> list[tuple[str, int | None, str | None]]:
    return [(r.path.relative_to(root).as_posix(), r.label, r.split) for r in records]


def found(root: Path, layout: str) -> list[tuple[str, int | None, str | None]]:
    """The records, the same by recognition and by name."""
    records = find_records(root)
    assert records == find_records(root, layout)
    assert records == sorted(records, key=lambda record: record.path.as_posix())
    return rows(records, root)


def test_archive(tmp_path: Path) -> None:
    touch(tmp_path, "train/NORMAL/b.jpeg", "train/NORMAL/a.jpeg", "test/normal/c.PNG")
    touch(tmp_path, "test/PNEUMONIA/d.jpeg", "test/Tuberculosis/sub/e.dcm", "test/NORMAL.txt")
    touch(tmp_path, "train/NORMAL/.DS_Store", "train/NORMAL/notes.txt", "contamination/P/f.jpeg")
    assert found(tmp_path, "archive") == [
        ("test/PNEUMONIA/d.jpeg", 1, "test"),
        ("test/Tuberculosis/sub/e.dcm", 1, "test"),
        ("test/normal/c.PNG", 0, "test"),
        ("train/NORMAL/a.jpeg", 0, "train"),
        ("train/NORMAL/b.jpeg", 0, "train"),
    ]
    touch(tmp_path, "train/stray.jpg")
    with pytest.raises(LayoutError, match=r"stray\.jpg"):
        find_records(tmp_path)


def test_authors(tmp_path: Path) -> None:
    touch(tmp_path, "train_256/normal_256/a.png", "valid_256_pa/normal_256/b.png")
    touch(tmp_path, "valid_256_pa/abnormal_256/c.png", "test/normal_256/d.png")
    touch(tmp_path, "test/pneumonia_256/e.png", "train/patient1/x.png")
    assert found(tmp_path, "authors") == [
        ("test/normal_256/d.png", 0, "test"),
        ("test/pneumonia_256/e.png", 1, "test"),
        ("train_256/normal_256/a.png", 0, "train"),
        ("valid_256_pa/abnormal_256/c.png", 1, "val"),
        ("valid_256_pa/normal_256/b.png", 0, "val"),
    ]


def test_flat(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "patient7/2021-03/c.JPG", "readme.md", ".hidden/d.png", "plain")
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "1.2.840.5").write_bytes(bytes(128) + b"DICM")
    assert found(tmp_path, "flat") == [
        ("1.2.840.5", None, None),
        ("IM0001", None, None),
        ("b.png", None, None),
        ("patient7/2021-03/c.JPG", None, None),
    ]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ["train/clean/a.png", "train/sick/b.png"],
            r"Of 2 folders \(clean, sick\) in .*train none",
        ),
        (["train/a.png", "test/b.png"], r"the names of 2 folders \(\w+, \w+\) may be labels"),
        (["0/a.png", "1/b.png"], r"2 folders \([01], [01]\) may be labels"),
        (["PNEUMONIA/a.png"], r"1 folder \(PNEUMONIA\) may be labels"),
        (["a.png", "COVID/b.png"], r"1 folder \(COVID\) may be labels"),
        (["images/a.png", "masks/a.png"], r"1 folder \(masks\) may be labels"),
        (["a.png", "labels.xlsx"], r"1 table \(labels.xlsx\) may hold labels"),
        (["p10/p100/a.png", "labels.csv.gz"], r"1 table \(labels.csv\) may hold labels"),
        (["images/a.png", "data/classes.json"], r"1 table \(classes.json\) may hold labels"),
        (["a.png", "a_mask.png", "b.png", "b_mask_1.png"], r"2 files \(.*\) may be masks"),
        (["IM-NORMAL-1.png", "person3_virus.png"], "1 of 2 images are called normal"),
        (["CHN_1_0.png", "CHN_2_0.png", "CHN_3_1.png"], "names of 3 images end in _0 or _1"),
        (["CHN_1_0.png", "CHN_2_1.png", "other.png"], "names of 2 images end in _0 or _1"),
        (["IM-0001.jpeg.png", "person3_virus_5.png"], r"1 image \(person3_virus_5\) speak of anom"),
        (["train_1.png", "train_2.png", "test_1.png"], r"2 splits \(test, train\)"),
        (["a.png", "mask_a.png"], r"1 file \(mask_a.png\) may be masks"),
        (["a.png", "labels.txt"], r"1 file \(labels.txt\) may hold labels"),
        (["a.png", "annotations.xml"], r"1 file \(annotations.xml\) may hold labels"),
        (["images/a.png", "test_list.txt"], r"1 file \(test_list.txt\) may hold labels"),
        (["images/a.png", "labels/a.txt"], r"1 file \(a.txt\) may hold labels"),
        (["a.png", "S.XLSX", "labels.ods"], r"2 tables \(S.XLSX, labels.ods\) may hold labels"),
        (["train\\NORMAL\\a.png", "test\\SICK\\b.png"], "whose name holds backslashes"),
        (["x/chest/train/NORMAL/a.png", "x/other/b.png"], "may be labels or splits"),
        (["chest/train/NORMAL/a.png", "other/b.png"], "'archive' fits .*chest: give that folder"),
    ],
)
def test_flat_is_not_guessed_where_something_speaks_of_labels(
    tmp_path: Path, names: list[str], reason: str
) -> None:
    touch(tmp_path, *names)
    with pytest.raises(LayoutError, match=rf"(?s){reason}.*Known are authors, archive"):
        find_records(tmp_path)
    images = [name for name in names if name.endswith(".png")]
    assert len(find_records(tmp_path, "flat")) == len(images)


def test_flat_takes_folders_that_say_nothing(tmp_path: Path) -> None:
    folders = ["p10/p10000032/s50414267", "Patient 7", "2021-03-01", "images_001/images", "siteB"]
    folders += ["1.2.840.113", "f0e1d2c3b4a59687", "CXR_png", "IMG/series2"]
    touch(tmp_path, "a.png", "a.json", *(f"{folder}/b.png" for folder in folders))
    records = find_records(tmp_path)
    assert len(records) == 1 + len(folders)
    assert {(record.label, record.split) for record in records} == {(None, None)}


def test_archive_without_splits(tmp_path: Path) -> None:
    """As the COVID-19 Radiography Database, which has masks beside its images."""
    touch(tmp_path, "COVID/images/a.png", "COVID/masks/a.png", "Normal/images/b.png")
    touch(tmp_path, "Normal/masks/b.png", "Viral Pneumonia/images/c.png", "Normal.metadata.xlsx")
    touch(tmp_path, "Lung_Opacity/d.png", "Lung_Opacity/d_mask.png", "Lung_Opacity/notes.txt")
    assert found(tmp_path, "archive") == [
        ("COVID/images/a.png", 1, None),
        ("Lung_Opacity/d.png", 1, None),
        ("Normal/images/b.png", 0, None),
        ("Viral Pneumonia/images/c.png", 1, None),
    ]
    left_out = LeftOut()
    find_records(tmp_path, left_out=left_out)
    assert left_out.counts == {"masks": 3, ".txt": 1}


@pytest.mark.parametrize(
    ("name", "label", "split"),
    [
        ("Training/notumor/a.png", 0, "train"),
        ("Testing/glioma/a.png", 1, "test"),
        ("train/good/a.png", 0, "train"),
        ("Val/Normal cases/deep/a.png", 0, "val"),
        ("validation/No_Finding/a.png", 0, "val"),
        ("TEST/abnormal/a.png", 1, "test"),
        ("test/non-normal/a.png", 1, "test"),
    ],
)
def test_other_words_for_classes_and_splits(
    tmp_path: Path, name: str, label: int, split: str
) -> None:
    touch(tmp_path, name, "train/normal/z.png", "ground_truth/scratch/a.png")
    assert (name, label, split) in found(tmp_path, "archive")
    assert len(find_records(tmp_path)) == 2


def test_names_that_people_give_to_classes_and_splits(tmp_path: Path) -> None:
    touch(tmp_path, "Training set/gesund/a.png", "Training set/krank/b.png", "train /normals/c.png")
    touch(tmp_path, "test_data/Normal (1)/d.png", "test_data/not normal/e.png")
    touch(tmp_path, "test_data/normal_patients/f.png", "test_data/Non-Healthy/g.png")
    touch(tmp_path, "test_data/normal/overlay/h.png", "test_data/normal/mask_d.png")
    assert found(tmp_path, "archive") == [
        ("Training set/gesund/a.png", 0, "train"),
        ("Training set/krank/b.png", 1, "train"),
        ("test_data/Non-Healthy/g.png", 1, "test"),
        ("test_data/Normal (1)/d.png", 0, "test"),
        ("test_data/normal/mask_d.png", 0, "test"),  # there is no image d beside it
        ("test_data/normal_patients/f.png", 0, "test"),
        ("test_data/not normal/e.png", 1, "test"),
        ("train /normals/c.png", 0, "train"),
    ]


def test_backslashes_in_names_are_told_in_class_folders_too(tmp_path: Path) -> None:
    touch(tmp_path, "train/NORMAL/a.png", "train/NORMAL/TB\\b.png")
    with pytest.raises(LayoutError, match=r"'TB\\\\b.png' is a file whose name holds backslashes"):
        find_records(tmp_path)


def test_an_image_is_not_in_two_splits_or_classes_by_links(tmp_path: Path) -> None:
    touch(tmp_path, "train/NORMAL/a.png", "test/NORMAL/b.png", "test/TB/c.png")
    (tmp_path / "val").symlink_to("test")
    labels = [(record.label, record.split) for record in find_records(tmp_path)]
    assert labels == [(0, "test"), (1, "test"), (0, "train"), (0, "val"), (1, "val")]
    link = tmp_path / "train/NORMAL/again.png"
    for target, reason in (
        ("test/NORMAL/b.png", "with label 0 in split test and with label 0 in split train"),
        ("test/TB/c.png", "with label 1 in split test and with label 0 in split train"),
    ):
        link.symlink_to(tmp_path / target)
        match = rf"again.png, which is \S*{target} by a link, is listed twice: {reason}"
        with pytest.raises(LayoutError, match=match):
            find_records(tmp_path)
        link.unlink()


def test_archive_with_the_splits_in_the_classes(tmp_path: Path) -> None:
    touch(tmp_path, "Normal/train/a.png", "Normal/test/b.png", "Sick/test/c.png", "Other/d.png")
    assert found(tmp_path, "archive") == [
        ("Normal/test/b.png", 0, "test"),
        ("Normal/train/a.png", 0, "train"),
        ("Other/d.png", 1, None),
        ("Sick/test/c.png", 1, "test"),
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["normal/a.png", "chest_xray/train/NORMAL/b.png", "chest_xray/more/c.png"],
        ["normal/a.png", "chest_xray/x/test/b.png"],
        ["normal/a.png", "chest_xray/normal/b.png"],
        ["train/normal/a.png", "train/set/normal/a.png"],
        ["normal/train/a.png", "normal/b.png"],
        ["normal/a.png", "b.png"],
        ["train/normal/a.png", "test/0/b.png", "test/1/b.png"],
        ["good/normal/a.png", "good/abnormal/b.png"],
        ["train/NORMAL/a.png", "train/NORMAL/Viral Pneumonia/b.png"],
        ["train/NORMAL/a.png", "test/NORMAL/b.png", "test/NORMAL - Copy/b.png"],
        ["train/NORMAL/a.png", "train/normal_augmented/b.png"],
        ["NORMAL/a.png", "TB/b.png", "unlabelled/c.png"],
        ["NORMAL/a.png", "TB/b.png", "images/c.png"],
        ["NORMAL/a.png", "TB/b.png", "evaluation-test/roc.png"],
        ["Normal/a.png", "COVID/b.png", "NonCOVID/c.png"],
    ],
)
def test_class_folders_that_hold_something_else_are_refused(
    tmp_path: Path, names: list[str]
) -> None:
    touch(tmp_path, *names)
    with pytest.raises(
        LayoutError, match=r"would be a class folder|beside|which of them is normal"
    ):
        find_records(tmp_path)


def test_the_only_folder_in_a_folder_is_meant(tmp_path: Path) -> None:
    kaggle = tmp_path / "kaggle"
    touch(kaggle, "a/chest_xray/train/NORMAL/b.png", "a/chest_xray.zip", "__MACOSX/x/c.png")
    touch(kaggle, "a/chest_xray/test/PNEUMONIA/c.png", "README.txt")
    assert found(kaggle, "archive") == [
        ("a/chest_xray/test/PNEUMONIA/c.png", 1, "test"),
        ("a/chest_xray/train/NORMAL/b.png", 0, "train"),
    ]
    chexpert(tmp_path / "parent" / "CheXpert-v1.0-small", 3)
    records = find_records(tmp_path / "parent")
    assert records == find_records(tmp_path / "parent" / "CheXpert-v1.0-small", "chexpert")
    touch(tmp_path, "flat/scans of ours/a.png")
    with pytest.raises(LayoutError, match=r"1 folder \(scans of ours\) may be labels"):
        find_records(tmp_path / "flat")


def test_links_are_followed_and_folders_that_cannot_be_listed_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "store/a.png", "set/train/NORMAL/b.png", "set/train/NORMAL/c.png/d.txt")
    (tmp_path / "set/train/NORMAL/more").symlink_to(tmp_path / "store")
    (tmp_path / "set/train/NORMAL/loop").symlink_to(tmp_path / "set")
    expected = [("train/NORMAL/b.png", 0, "train"), ("train/NORMAL/more/a.png", 0, "train")]
    assert found(tmp_path / "set", "archive") == expected
    locked = tmp_path / "set/train/NORMAL/locked"
    touch(locked, "e.png")
    scan = os.scandir

    def refuse(path: str) -> object:  # permissions would not stop the superuser
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(LayoutError, match="locked is a folder that cannot be listed"):
        find_records(tmp_path / "set")


def test_nih(tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID\n1_0.png,Cardiomegaly|Effusion,0,1\n"
        "2_0.png,No Finding,0,2\n3_0.png,No Finding,0,3\n4_0.png,No Finding,0,4\n"
    )
    touch(tmp_path, "images_001/images/1_0.png", "images_002/images/2_0.png", "images/3_0.png")
    touch(tmp_path, "copy/1_0.png", "other.png", "README.txt")
    (tmp_path / "train_val_list.txt").write_text("1_0.png\n2_0.png\n")
    (tmp_path / "test_list.txt").write_text("3_0.png\r\n4_0.png\r\n")
    left_out = LeftOut()
    with pytest.warns(UserWarning, match="1 of the 4 images that .* names are not under"):
        records = find_records(tmp_path, left_out=left_out)
    assert rows(records, tmp_path) == [
        ("copy/1_0.png", 1, "train"),
        ("images/3_0.png", 0, "test"),
        ("images_002/images/2_0.png", 0, "train"),
    ]
    counts = {"copies": 1, "not in Data_Entry_2017.csv": 1, ".txt": 3, ".csv": 1}
    assert left_out.counts == counts


def test_rsna(tmp_path: Path) -> None:
    (tmp_path / "stage_2_train_labels.csv").write_text(
        "patientId,x,y,width,height,Target\na,,,,,0\nb,1,1,5,5,1\nb,9,9,5,5,1\nd,,,,,0\n"
    )
    touch(tmp_path, *(f"stage_2_train_images/{name}.dcm" for name in "abd"))
    touch(tmp_path, "stage_2_test_images/c.dcm")
    with pytest.warns(UserWarning, match="Target 0 is taken as normal"):
        records = rows(find_records(tmp_path), tmp_path)
    test = ("stage_2_test_images/c.dcm", None, "test")
    labels = {"a": 0, "b": 1, "d": 0}
    train = [(f"stage_2_train_images/{name}.dcm", label, "train") for name, label in labels.items()]
    assert records == [test, *train]
    (tmp_path / "stage_2_detailed_class_info.csv").write_text(
        "patientId,class\na,Normal\nb,Lung Opacity\nb,Lung Opacity\n"
        "d,No Lung Opacity / Not Normal\n"
    )
    detailed = rows(find_records(tmp_path), tmp_path)
    assert detailed == [test, *train[:2], ("stage_2_train_images/d.dcm", 1, "train")]


@pytest.mark.parametrize(
    "content",
    [
        {"train": {"0": ["a.png"]}, "test": {"0": ["b.png"], "1": ["c.png"]}},
        {"train": ["a.png"], "test": {"normal": ["b.png"], "abnormal": ["c.png"]}},
        {"train": {"normal": ["a.png"]}, "test": {"Normal": ["b.png"], "anomaly": ["c.png"]}},
    ],
)
def test_medianomaly(tmp_path: Path, content: object) -> None:
    touch(tmp_path, "images/a.png", "images/b.png", "images/c.png", "images/unlisted.png")
    (tmp_path / "data.json").write_text(json.dumps(content))
    assert found(tmp_path, "medianomaly") == [
        ("images/a.png", 0, "train"),
        ("images/b.png", 0, "test"),
        ("images/c.png", 1, "test"),
    ]


def test_medianomaly_with_its_unlabelled_pool(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png")
    pool = {"0": ["d.png"], "1": ["e.png"]}
    (tmp_path / "data.json").write_text(json.dumps({"train": {"0": ["a.png"], "unlabeled": pool}}))
    assert found(tmp_path, "medianomaly") == [
        ("images/a.png", 0, "train"),
        ("images/d.png", 0, "unlabeled"),
        ("images/e.png", 1, "unlabeled"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "no 'train' or 'test'"),
        ('{"train": {"sick": ["a.png"]}}', "holds 'sick'"),
        ('{"train": {"0": "a.png"}}', "holds '0'"),
        ('{"train": 3}', "is int"),
        ('{"train": {"0": ["../../etc/passwd"]}}', "lies outside"),
        ('{"train": {"0": ["a.png"]}, "test": {"1": ["a.png"]}}', "listed twice"),
    ],
)
def test_medianomaly_errors(tmp_path: Path, text: str, reason: str) -> None:
    touch(tmp_path, "images/a.png")
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(LayoutError, match=reason):
        find_records(tmp_path)


HEADER = "Path,Sex,Frontal/Lateral,AP/PA,No Finding,Edema\n"


def chexpert(root: Path, patients: int, prefix: str = "CheXpert-v1.0-small/") -> None:
    lines = []
    for number in range(patients):
        for study, finding in (("study1", "1.0"), ("study2", "")):
            name = f"train/patient{number:05d}/{study}/view1_frontal.jpg"
            touch(root, name)
            lines.append(f"{prefix}{name},Male,Frontal,AP,{finding},\n")
        lines.append(
            f"{prefix}train/patient{number:05d}/study1/view2_lateral.jpg,M,Lateral,,1.0,\n"
        )
    (root / "train.csv").write_text(HEADER + "".join(lines))


def test_chexpert_splits_by_patient(tmp_path: Path) -> None:
    chexpert(tmp_path, 200)
    records = find_records(tmp_path)
    assert records == find_records(tmp_path, "chexpert")
    assert len(records) == 400
    assert not any("lateral" in r.path.name for r in records)
    of_patient: dict[str, set[str | None]] = {}
    for record in records:
        assert record.label == (0 if "study1" in record.path.parts else 1)
        of_patient.setdefault(record.path.parts[-3], set()).add(record.split)
    assert all(len(splits) == 1 for splits in of_patient.values())
    counts = {s: len(select(records, split=s)) // 2 for s in ("train", "val", "test")}
    assert sum(counts.values()) == 200
    assert 10 <= counts["val"] <= 35
    assert 10 <= counts["test"] <= 35
    # fixed for good: the hash of a patient's number, not of this machine or run
    pinned = [of_patient[f"patient{number:05d}"] for number in range(4)]
    assert pinned == [{"train"}, {"train"}, {"train"}, {"val"}]


def test_chexpert_valid_csv_is_the_test_split(tmp_path: Path) -> None:
    chexpert(tmp_path, 60, prefix="")
    touch(tmp_path, "valid/patient64541/study1/view1_frontal.jpg")
    (tmp_path / "valid.csv").write_text(
        HEADER
        + "valid/patient64541/study1/view1_frontal.jpg,F,Frontal,AP,0.0,1\n"
        + "train/patient00005/study1/view1_frontal.jpg,F,Frontal,AP,1.0,\n"
    )
    records = find_records(tmp_path)
    tested = rows(select(records, split="test"), tmp_path)
    assert tested == [  # patient 5 is in both files and so wholly here
        ("train/patient00005/study1/view1_frontal.jpg", 0, "test"),
        ("train/patient00005/study2/view1_frontal.jpg", 1, "test"),
        ("valid/patient64541/study1/view1_frontal.jpg", 1, "test"),
    ]
    assert {r.split for r in records} == {"train", "val", "test"}


def test_chexpert_errors(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(HEADER + "a/patient00001/x.jpg,M,Frontal,AP,1.0,\n")
    with pytest.raises(LayoutError, match="none of the 1 images"):
        find_records(tmp_path)
    touch(tmp_path, "a/x.jpg")
    (tmp_path / "train.csv").write_text(HEADER + "a/x.jpg,M,Frontal,AP,1.0,\n")
    with pytest.raises(LayoutError, match="no patient number"):
        find_records(tmp_path)
    (tmp_path / "train.csv").write_text("Path,Sex\nx,y\n")
    with pytest.raises(LayoutError, match="lacks the columns frontal/lateral, no finding"):
        find_records(tmp_path, "chexpert")


def test_covidx(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.png", "train/COVID (12).png", "test/c.jpg")
    listed = "1 a.png normal rsna\n2 COVID (12).png COVID-19 x\n"
    (tmp_path / "train_COVIDx9A.txt").write_text(listed)
    (tmp_path / "test_COVIDx9A.txt").write_text("3 c.jpg pneumonia\n\n")
    assert found(tmp_path, "covidx") == [
        ("test/c.jpg", 1, "test"),
        ("train/COVID (12).png", 1, "train"),
        ("train/a.png", 0, "train"),
    ]


def test_covidx_binary_lists_warn(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "val.txt").write_text("1 a.png negative rsna\n2 b.png positive sirm\n")
    with pytest.warns(UserWarning, match="'negative' is taken as normal"):
        records = find_records(tmp_path)
    assert rows(records, tmp_path) == [("a.png", 0, "val"), ("b.png", 1, "val")]


def test_covidx_errors(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.png")
    (tmp_path / "train.txt").write_text("1 a.png normal rsna\nrubbish\n")
    with pytest.raises(LayoutError, match="line 2 is 'rubbish'"):
        find_records(tmp_path)
    (tmp_path / "train_COVIDx5.txt").write_text("1 a.png normal rsna\n")
    with pytest.raises(LayoutError, match="both list the split 'train'"):
        find_records(tmp_path)


TABLE = "image_path,label,split,kind\n"


def test_table(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text(
        "\ufeff"  # as spreadsheet programs begin their files
        + TABLE
        + "b/x.png,abnormal,test,k\na.png,0,train,\nc.png,,,\nd.png,1.0,valid,\n",
        encoding="utf-8",
    )
    (tmp_path / "other.csv").write_text("name,age\nx,3\n")
    expected = [
        ("a.png", 0, "train"), ("b/x.png", 1, "test"), ("c.png", None, None), ("d.png", 1, "val")
    ]  # fmt: skip
    assert found(tmp_path, "table") == expected
    assert rows(find_records(tmp_path / "set.csv"), tmp_path) == expected
    (tmp_path / "set2.csv").write_text("image_path\nonly.png\n")
    with pytest.raises(LayoutError, match=r"2 tables \(set.csv, set2.csv\)"):
        find_records(tmp_path)
    assert rows(find_records(tmp_path / "set2.csv"), tmp_path) == [("only.png", None, None)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("../secret.png,0,train,", "lies outside"),
        ("a/../../secret.png,0,train,", "lies outside"),
        ("a.png,sick,train,", "label 'sick'"),
        (",0,train,", "row 1 has no image_path"),
        ("a.png,0,train,\na.png,1,train,", "listed twice"),
    ],
)
def test_table_errors(tmp_path: Path, row: str, reason: str) -> None:
    (tmp_path / "set.csv").write_text(TABLE + row + "\n")
    with pytest.raises(LayoutError, match=reason):
        find_records(tmp_path)


def test_table_paths_inside_and_absolute(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    lines = f"a/../b.png,0,train,\n{tmp_path}/c.png,1,test,\nb.png,0,train,\n"
    (inner / "set.csv").write_text(TABLE + lines)
    paths = [record.path for record in find_records(inner)]
    assert paths == [tmp_path / "c.png", inner / "b.png"]  # the same row twice counts once


@pytest.mark.parametrize(
    "content",
    [
        "image_path;label;split\nü.png;normal;Training\nsub\\b.png;1;testing\n".encode("latin-1"),
        "filename\tsplit\tlabel\nü.png\ttrain\t0\nsub\\b.png\ttest\tabnormal\n".encode("utf-16"),
        "File_Path , Label, Split,age\n ü.png,0,TRAIN,3\nsub/b.png,1,test,4\n".encode("utf-8-sig"),
    ],
    ids=["latin-1", "utf-16", "utf-8"],
)
def test_tables_as_programs_write_them(tmp_path: Path, content: bytes) -> None:
    touch(tmp_path, "ü.png", "sub/b.png")
    (tmp_path / "set.csv").write_bytes(content)
    assert found(tmp_path, "table") == [("sub/b.png", 1, "test"), ("ü.png", 0, "train")]


def test_tables_whose_labels_are_called_otherwise_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "set.csv").write_text("image_path,Diagnosis\na.png,Pneumonia\nb.png,none\n")
    with pytest.raises(LayoutError, match=r"no column label, but 1 column \(diagnosis\) that may"):
        find_records(tmp_path)
    (tmp_path / "set.csv").write_text("scan;Diagnosis\na.png;Pneumonia\nb.png;none\n")
    with pytest.raises(LayoutError, match=r"set.csv has scan, diagnosis; a table has image_path"):
        find_records(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image_path,label,label\na.png,0,1", "line 2 has '0' and '1' in two columns .* label"),
        ("image_path,label\na,b.png,0", "line 2 has 3 cells, the header 2"),
        ('image_path,label\n"a.png,0\nb.png,1\n', "line 3 cannot be read as CSV"),
        ("image_path,y\na.png,0", r"no column label, but 1 column \(y\)"),
        ("image_path,is_abnormal\na.png,0", r"no column label, but 1 column \(is_abnormal\)"),
        (
            "image_path,label,set\na.png,0,Train\nb.png,0,test",
            r"'set' holds 2 splits \(test, train\)",
        ),
    ],
)
def test_tables_that_would_be_misread_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "set.csv").write_text(text)
    with pytest.raises(LayoutError, match=reason):
        find_records(tmp_path)


def test_tables_beside_one_without_labels(tmp_path: Path) -> None:
    """As the reports of Indiana University: one table names images, another has the findings."""
    (tmp_path / "projections.csv").write_text("uid,filename,z_score\n1,a.png,\n\n2,b.png,,,\n")
    (tmp_path / "REPORTS.CSV").write_text("uid,Problems\n1,normal\n2,Opacity\n")
    with pytest.raises(LayoutError, match=r"beside it 1 table \(REPORTS.CSV\) may hold labels"):
        find_records(tmp_path)
    records = find_records(tmp_path / "projections.csv")
    assert rows(records, tmp_path) == [("a.png", None, None), ("b.png", None, None)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("No,Image Index,Finding Labels\n1,a.png,Mass\n2\n", "line 3 is too short: it lacks find"),
        ("Image Index,Finding Labels\na.png,Mass\na.png,No Finding", "gives a.png other findings"),
        ("No,patientId,Target\n1,a,0\n2", "line 3 is too short: it lacks patientid, target"),
    ],
)
def test_tables_with_broken_rows(tmp_path: Path, text: str, reason: str) -> None:
    touch(tmp_path, "train_images/a.png")
    (tmp_path / "Data.csv").write_text(text)
    with pytest.raises(LayoutError, match=reason):
        find_records(tmp_path)


def test_errors_say_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="does not exist"):
        find_records(tmp_path / "gone")
    with pytest.raises(LayoutError, match="holds no folders and no files"):
        find_records(tmp_path)
    touch(tmp_path, "a.png", "notes.txt")
    with pytest.raises(LayoutError, match="is a file"):
        find_records(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="layout is 'zip'; known are auto, authors"):
        find_records(tmp_path, "zip")
    for layout in LAYOUTS.keys() - {"flat"}:
        with pytest.raises(LayoutError):
            find_records(tmp_path, layout)


def test_errors_keep_the_blanks_of_a_name(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"^'\S+/set ' does not exist"):
        find_records(tmp_path / "set ")


def test_select() -> None:
    given = {"a": (0, "train"), "b": (1, "test"), "c": (0, "test")}
    a, b, c = (Record(Path(name), *known) for name, known in given.items())
    assert select([a, b, c], split="test") == [b, c]
    assert select([a, b, c], label=0) == [a, c]
    assert select([a, b, c], "test", 0) == [c]
    assert select([a, b, c]) == [a, b, c]


def test_overview() -> None:
    known = [(0, "train"), (0, "train"), (1, "test"), (None, "test"), (0, None), (1, "external")]
    records = [Record(Path(f"{i}.png"), *label_split) for i, label_split in enumerate(known)]
    assert overview(records) == (
        "train 2 normal; test 1 anomalous, 1 of unknown label; without split 1 normal; "
        "external 1 anomalous"
    )
    assert overview([]) == ""
