"""What verbs say of the images they found, and of a split that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("typer")

from squid_fast.cli.datasets import found_records, labelled
from squid_fast.data import Record
from tests.command_line import squid

TRAIN = ("--preset", "small", "--epochs", "1", "--batch-size", "4", "--device", "cpu")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_what_is_found_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "train/NORMAL/a.png", "train/NORMAL/b.png", "train/NORMAL/notes.txt")
    touch(tmp_path, "test/NORMAL/c.png", "test/PNEUMONIA/d.png", "test/PNEUMONIA/d_mask.png")
    assert len(found_records(tmp_path)) == 4
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}: train 2 normal; test 1 normal, 1 anomalous",
        "2 files are left out, being no images: 1 .txt, 1 masks",
    ]


def test_images_of_unknown_label_are_told_before_training(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("lightning_fabric")
    data = tmp_path / "data"
    data.mkdir()
    for index in range(20):
        image.new("L", (48, 48), index).save(data / f"{index}.png")
    done = squid("train", *TRAIN, "--data", data, "--out", tmp_path / "run")
    said = done.stderr.replace(f"{data}: ", "").splitlines()
    assert said[:3] == [
        "without split 20 of unknown label",
        "20 training images, 0 for validation",
        "20 training images of unknown label are taken as normal",
    ]


RECORDS = [
    Record(Path("a.png"), 0, "train"),
    Record(Path("b.png"), 0, "val"),
    Record(Path("c.png"), 1, "val"),
    Record(Path("d.png"), None, "test"),
]


@pytest.mark.parametrize("split", ["val", "valid", "Validation"])
def test_a_split_by_its_other_names(split: str) -> None:
    assert labelled(RECORDS, split, Path("set")) == RECORDS[1:3]


def test_all_labelled_images() -> None:
    assert labelled(RECORDS, "all", Path("set")) == RECORDS[:3]


@pytest.mark.parametrize("split", ["test", "exam"])
def test_a_split_without_labelled_images_names_those_there_are(split: str) -> None:
    message = (
        f"set has no labelled images in the split '{split}'; it has train 1 normal; val 1 normal, "
        r"1 anomalous; test 1 of unknown label\."
    )
    with pytest.raises(ValueError, match=message):
        labelled(RECORDS, split, Path("set"))
