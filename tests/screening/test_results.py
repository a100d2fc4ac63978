"""Result tables: round trips, whole or not at all; running figures."""

from __future__ import annotations

import csv
import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squid_fast.screening import COLUMNS, ScreenRow, results, utf8_text, write_table
from tests.screening.limits import file_size_limit

STRANGE = os.fsdecode(
    b"caf\xe9/\xf0\x9f\xa9\xbb.png"
)  # one byte that is not UTF-8, one sign that is
ROWS = [
    ScreenRow('a, "b"\nc.png', 0.1, 2.5, 0.924, True, 1.64, None),
    ScreenRow("plain.png", -1e-9, -3.25, 0.037, False, 1.64, None),
    ScreenRow(STRANGE, None, None, None, None, 1.64, f"{STRANGE} is no image"),
]
SAFE = "caf\\xe9/\U0001fa7b.png"


def scored(index: int, z: float, flag: bool = False) -> ScreenRow:
    return ScreenRow(f"{index}.png", z / 2, z, 0.5, flag, 1.64, None)


def failed(index: int) -> ScreenRow:
    return ScreenRow(f"bad-{index}.png", None, None, None, None, 1.64, f"reason {index}")


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows as dicts of Python values, whatever the format."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    with open(path, encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        for key, value in row.items():
            if value == "":
                row[key] = None
            elif key == "flag":
                row[key] = {"true": True, "false": False}[value]
            elif key not in ("path", "error"):
                row[key] = float(value)
    return rows


FORMATS = pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])


@FORMATS
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"results{suffix}"
    write_table(iter(ROWS), path)
    table = read_table(path)
    assert [tuple(row) for row in table] == [COLUMNS] * 3
    assert COLUMNS == (
        "path", "raw_score", "z_score", "anomaly_score", "flag", "threshold", "error",
    )  # fmt: skip
    assert [tuple(row.values()) for row in table] == [
        ('a, "b"\nc.png', 0.1, 2.5, 0.924, True, 1.64, None),
        ("plain.png", -1e-9, -3.25, 0.037, False, 1.64, None),
        (SAFE, None, None, None, None, 1.64, f"{SAFE} is no image"),
    ]
    assert os.listdir(tmp_path) == [path.name]


def test_text_formats_to_the_byte(tmp_path: Path) -> None:
    for suffix in (".csv", ".jsonl"):
        write_table(ROWS[1:], tmp_path / f"r{suffix}")
    assert (tmp_path / "r.csv").read_bytes().decode() == (
        "path,raw_score,z_score,anomaly_score,flag,threshold,error\n"
        "plain.png,-1e-09,-3.25,0.037,false,1.64,\n"
        f"{SAFE},,,,,1.64,{SAFE} is no image\n"
    )
    assert (tmp_path / "r.jsonl").read_bytes().decode() == (
        '{"path": "plain.png", "raw_score": -1e-09, "z_score": -3.25, "anomaly_score": 0.037, '
        '"flag": false, "threshold": 1.64, "error": null}\n'
        f'{{"path": {json.dumps(SAFE, ensure_ascii=False)}, "raw_score": null, "z_score": null, '
        f'"anomaly_score": null, "flag": null, "threshold": 1.64, '
        f'"error": {json.dumps(SAFE + " is no image", ensure_ascii=False)}}}\n'
    )


@FORMATS
def test_a_name_with_a_line_end_gives_one_row(tmp_path: Path, suffix: str) -> None:
    names = [
        "Icon\r",
        "a\rb.png",
        "a\r\nb",
        "a\nb",
        "a\u2028b",
        "a\x85b",
        "=cmd",
        " a ",
        'q"q',
        "a,b",
    ]
    path = tmp_path / f"results{suffix}"
    write_table([replace(failed(0), path=n, error=f"{n} is empty\0") for n in names], path)
    table = read_table(path)
    assert [row["path"] for row in table] == names
    assert [row["error"] for row in table] == [f"{name} is empty\\x00" for name in names]
    if suffix == ".jsonl":
        assert len(path.read_text("utf-8").splitlines()) == len(names)
    if suffix == ".csv":
        pandas = pytest.importorskip("pandas")
        assert list(pandas.read_csv(path)["path"]) == names


@FORMATS
def test_no_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"results{suffix}"
    write_table([], path)
    assert read_table(path) == []
    if suffix == ".csv":
        assert path.read_text() == "path,raw_score,z_score,anomaly_score,flag,threshold,error\n"


@FORMATS
def test_what_fails_leaves_the_old_table_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"results{suffix}"
    path.write_bytes(b"the last run")

    def interrupted() -> Iterator[ScreenRow]:
        yield from ROWS[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(interrupted(), path)
    assert path.read_bytes() == b"the last run"
    assert os.listdir(tmp_path) == [path.name]


@FORMATS
def test_full_disk_while_writing_leaves_the_old_table(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"results{suffix}"
    path.write_bytes(b"the last run")
    scores = np.random.default_rng(0).normal(size=20_000)  # which cannot be packed below the limit
    with file_size_limit(60_000), pytest.raises(OSError, match="File too large"):
        write_table((scored(i, z) for i, z in enumerate(scores.tolist())), path)
    assert path.read_bytes() == b"the last run"
    assert os.listdir(tmp_path) == [path.name]


def test_a_table_reaches_the_disk_before_its_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, fsync = os.replace, os.fsync

    def noted_fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        done.append(f"{source.name} to {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_table(ROWS, tmp_path / "r.csv")
    assert done == ["file", "r.csv.new to r.csv", "folder"]


def test_parquet_is_typed_and_streams_in_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(results, "_ROWS_AT_ONCE", 10)
    write_table((scored(i, float(i)) for i in range(25)), tmp_path / "r.parquet")
    file = parquet.ParquetFile(tmp_path / "r.parquet")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [10, 10, 5]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert file.read().column("z_score").to_pylist() == [float(i) for i in range(25)]
    text, number = arrow.string(), arrow.float64()
    assert file.schema_arrow.types == [text, number, number, number, arrow.bool_(), number, text]


@FORMATS
def test_a_group_of_errors_alone(tmp_path: Path, suffix: str) -> None:
    write_table([failed(0), failed(1)], tmp_path / f"r{suffix}")
    rows = read_table(tmp_path / f"r{suffix}")
    assert [(row["path"], row["flag"], row["error"]) for row in rows] == [
        ("bad-0.png", None, "reason 0"),
        ("bad-1.png", None, "reason 1"),
    ]


def test_json_lines_have_no_infinity(tmp_path: Path) -> None:
    write_table([ScreenRow("a", None, None, None, None, float("inf"), "why")], tmp_path / "r.jsonl")
    assert json.loads((tmp_path / "r.jsonl").read_text())["threshold"] is None


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.parquet, \.csv, \.jsonl; 'r\.xlsx' has the suffix"):
        write_table(ROWS, tmp_path / "r.xlsx")
    assert os.listdir(tmp_path) == []


def test_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"squid-fast\[screen\]"):
        write_table(ROWS, tmp_path / "r.parquet")
    assert os.listdir(tmp_path) == []


def test_utf8_text() -> None:
    assert utf8_text("r\N{LATIN SMALL LETTER O WITH DIAERESIS}ntgen") == "röntgen"
    assert utf8_text(STRANGE) == SAFE
    assert utf8_text("lone \ud800") == "lone \\ud800"
