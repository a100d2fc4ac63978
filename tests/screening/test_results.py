"""Result tables: round trips, whole or marked as partial; running figures."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squid_fast.screening import (
    COLUMNS,
    ScreenRow,
    Summary,
    open_writer,
    summarise,
    utf8_text,
)
from squid_fast.screening.results import _ParquetTable

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
    path = tmp_path / "new" / f"results{suffix}"
    with open_writer(path) as writer:
        writer.write(iter(ROWS[:2]))
        writer.write(ROWS[2])
        assert not path.exists()
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
    assert os.listdir(path.parent) == [path.name]


@FORMATS
def test_no_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"results{suffix}"
    with open_writer(path):
        pass
    assert read_table(path) == []
    if suffix == ".csv":
        assert path.read_text() == "path,raw_score,z_score,anomaly_score,flag,threshold,error\n"


@FORMATS
def test_exception_keeps_the_rows_so_far_and_the_old_table(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"results{suffix}"
    path.write_bytes(b"the last run")

    def interrupted() -> Iterator[ScreenRow]:
        yield from ROWS[:2]
        raise KeyboardInterrupt

    for attempt in ("partial", "partial-2"):
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(KeyboardInterrupt),
            open_writer(path) as writer,
        ):
            writer.write(interrupted())
        partial = tmp_path / f"results.{attempt}{suffix}"
        assert writer.partial_path == partial
        assert [row["path"] for row in read_table(partial)] == [row.path for row in ROWS[:2]]
        message = caplog.records[-1].getMessage()
        assert f"{path.name} was not finished; the 2 rows so far are in {partial}" in message
    assert path.read_bytes() == b"the last run"


def test_failure_to_finish_is_raised_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), open_writer(tmp_path / "r.csv") as writer:
        writer.write(ROWS)
    assert os.listdir(tmp_path) == ["r.partial.csv"]
    assert "the 3 rows so far are in" in caplog.text


def test_parquet_streams_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(_ParquetTable, "rows_per_group", 10)
    with open_writer(tmp_path / "r.parquet") as writer:
        writer.write(scored(i, float(i)) for i in range(25))
    file = parquet.ParquetFile(tmp_path / "r.parquet")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [10, 10, 5]
    assert file.read().column("z_score").to_pylist() == [float(i) for i in range(25)]


def test_json_lines_have_no_nan(tmp_path: Path) -> None:
    with open_writer(tmp_path / "r.jsonl") as writer:
        writer.write(ScreenRow("a", None, None, None, None, float("inf"), "why"))
    assert json.loads((tmp_path / "r.jsonl").read_text())["threshold"] is None


def test_unusable_places_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.parquet, \.csv, \.jsonl; 'r\.xlsx' has the suffix"):
        open_writer(tmp_path / "r.xlsx")
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(IsADirectoryError, match="is a directory, not a result file"):
        open_writer(tmp_path / "d.csv")
    assert os.listdir(tmp_path) == ["d.csv"]


def test_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"squid-fast\[screen\]"):
        open_writer(tmp_path / "r.parquet")
    assert os.listdir(tmp_path) == []


def test_utf8_text() -> None:
    assert utf8_text("r\N{LATIN SMALL LETTER O WITH DIAERESIS}ntgen") == "röntgen"
    assert utf8_text(STRANGE) == SAFE
    assert utf8_text("lone \ud800") == "lone \\ud800"


def test_summary_counts_and_quantiles() -> None:
    rows = [scored(i, float(i), flag=i > 95) for i in range(101)]
    rows[50:50] = [failed(i) for i in range(7)]
    summary = Summary()
    assert list(summary.watch(rows)) == rows
    assert summary.as_dict() == {
        "count": 108,
        "scored": 101,
        "flagged": 5,
        "errors": 7,
        "threshold": 1.64,
        "z_score": {"min": 0.0, "q05": 5.0, "median": 50.0, "q95": 95.0, "max": 100.0},
    }
    json.dumps(summary.as_dict())


def test_summary_of_nothing_and_of_errors_only() -> None:
    assert Summary().as_dict() == {
        "count": 0, "scored": 0, "flagged": 0, "errors": 0, "threshold": None, "z_score": None,
    }  # fmt: skip
    summary = summarise([failed(0)])
    assert (summary.count, summary.scored, summary.errors) == (1, 0, 1)
    assert summary.most_anomalous == []
    assert summary.as_dict()["z_score"] is None


def test_most_anomalous_are_the_greatest_earlier_first_among_equals() -> None:
    values = np.random.default_rng(1).integers(0, 40, 500).astype(float)
    rows = [scored(i, z) for i, z in enumerate(values)]
    expected = sorted(rows, key=lambda row: -(row.z_score or 0.0))[:30]  # stable
    assert summarise(rows, top_k=30).most_anomalous == expected
    assert summarise(rows, top_k=0).most_anomalous == []
    assert summarise(rows[:3], top_k=30).most_anomalous == sorted(
        rows[:3], key=lambda row: -(row.z_score or 0.0)
    )


def test_ranking_does_not_use_the_saturated_score() -> None:
    rows = [ScreenRow(str(z), z, z, 1.0, True, 1.64, None) for z in (30.0, 90.0, 60.0)]
    assert [row.path for row in summarise(rows).most_anomalous] == ["90.0", "60.0", "30.0"]


def test_error_rows_are_capped() -> None:
    summary = summarise([failed(i) for i in range(1000)], max_errors=3)
    assert summary.errors == 1000
    assert [row.path for row in summary.error_rows] == ["bad-0.png", "bad-1.png", "bad-2.png"]


def test_negative_caps_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        Summary(top_k=-1)
