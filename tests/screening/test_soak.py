"""A small soak, and that a soak sees what could go wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("typer")
pytest.importorskip("PIL")

from bench.scoring.images import BROKEN, ImageFolder, make_images  # noqa: E402
from bench.scoring.soak import Soak, check, soak  # noqa: E402
from squid_fast.screening import ScreenRow, find_files, write_table  # noqa: E402


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
def test_a_run_that_is_killed_twice_gives_every_file_one_row(tmp_path: Path) -> None:
    result = soak(files=300, broken=0.05, kills=2, seed=0, folder=tmp_path)
    assert result.problems == []
    assert (result.rows, result.errors) == (300, 15)
    assert [kill["killed"] for kill in result.kills] == ["group", "parent"]
    assert any(0 < kill["rows_done"] < 300 for kill in result.kills)


def test_the_images_are_those_that_screening_lists(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 60, 10, np.random.default_rng(3))
    assert images.files == find_files(tmp_path / "images")
    assert len(images.files) == 60
    ways = {way for way in BROKEN for path in images.broken if path.endswith(way)}
    assert ways == set(BROKEN)
    assert images.originals.keys() == set(images.files) - images.broken


@pytest.fixture
def images() -> ImageFolder:
    """Six files, links to three images, and one that is broken."""
    files = [f"{number}.png" for number in range(7)]
    return ImageFolder(
        files, {"3.png"}, {p: Path(f"{int(p[0]) % 3}") for p in files if p[0] != "3"}
    )


def rows(images: ImageFolder) -> list[ScreenRow]:
    made = []
    for path in images.files:
        z = int(path[0]) % 3 + 0.5
        if path in images.broken:
            made.append(ScreenRow(path, None, None, None, None, 1.0, "broken"))
        else:
            made.append(ScreenRow(path, z, z, 0.5, z > 1, 1.0, None))
    return made


def changed(row: ScreenRow, **values: Any) -> ScreenRow:
    return ScreenRow(**(vars(row) | values))


def test_what_is_wrong_in_a_table_is_found(images: ImageFolder, tmp_path: Path) -> None:
    right = rows(images)
    write_table(right, tmp_path / "whole.parquet")
    cases = {
        "": right,
        "6 rows for 7 files, 0 of them doubled": right[:-1],
        "8 rows for 7 files, 1 of them doubled": [*right, right[-1]],
        "7 rows for 7 files, 1 of them doubled": [*right[:2], right[1], *right[3:]],
        "7 rows for 7 files, 0 of them doubled": [right[1], right[0], *right[2:]],
        "1 files are errors and fine": [
            *right[:6], changed(right[3], path="6.png"),
        ],
        "scores of the same image differ by 1.0": [
            changed(right[0], z_score=1.5, flag=True), *right[1:],
        ],
        "flags differ": [changed(right[0], flag=True), *right[1:]],
    }  # fmt: skip
    for problem, table in cases.items():
        write_table(table, tmp_path / "killed.parquet")
        result = Soak(seed=0, files=7, broken=1)
        check(images, tmp_path / "whole.parquet", tmp_path / "killed.parquet", result)
        assert bool(result.problems) == bool(problem)
        assert problem in "".join(result.problems)
    same = [changed(row, z_score=0.5) if row.z_score else row for row in right]
    for name in ("whole", "killed"):
        write_table(same, tmp_path / f"{name}.parquet")
    check(images, tmp_path / "whole.parquet", tmp_path / "killed.parquet", result := Soak(0, 7, 1))
    assert "different images have the same score" in result.problems[0]
