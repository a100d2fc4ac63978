"""The figures of a run: right, in bounded memory, and errors told apart by their kind."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from squid_fast.data import ImageReadError
from squid_fast.screening import ScreenRow, Summary, summarise


def scored(index: int, z: float, flag: bool = False) -> ScreenRow:
    return ScreenRow(f"{index:03d}.png", z, z, 0.5, flag, 1.64, None)


def failed(path: str, error: str, kind: str | None = None) -> ScreenRow:
    return ScreenRow(path, None, None, None, None, 1.64, error, kind)


def kinds(*rows: ScreenRow) -> list[tuple[str, int]]:
    return [(kind.reason, kind.count) for kind in summarise(rows).error_kinds]


def test_counts_and_quantiles() -> None:
    rows = [scored(i, float(i), flag=i > 95) for i in range(101)]
    rows[50:50] = [failed(f"bad-{i}.png", f"bad-{i}.png is empty") for i in range(7)]
    summary = Summary()
    summary.left_out = {".txt": 2}
    assert list(summary.watch(rows)) == rows
    assert summary.as_dict() == {
        "count": 108,
        "scored": 101,
        "flagged": 5,
        "errors": 7,
        "threshold": 1.64,
        "left_out": {".txt": 2},
        "z_score": {"min": 0.0, "q05": 5.0, "median": 50.0, "q95": 95.0, "max": 100.0},
        "error_kinds": [{"reason": "the file is empty", "count": 7, "example": "bad-0.png"}],
    }
    json.dumps(summary.as_dict())


def test_summary_of_nothing_and_of_errors_only() -> None:
    assert Summary().as_dict() == {
        "count": 0, "scored": 0, "flagged": 0, "errors": 0, "threshold": None, "left_out": {},
        "z_score": None, "error_kinds": [],
    }  # fmt: skip
    summary = summarise([failed("a", "a is empty")])
    assert (summary.count, summary.scored, summary.errors) == (1, 0, 1)
    assert summary.most_anomalous == summary.flagged_rows == []
    assert summary.as_dict()["z_score"] is None


def test_most_anomalous_are_the_greatest_earlier_first_among_equals() -> None:
    values = np.random.default_rng(1).integers(0, 40, 3000).astype(float)
    rows = [scored(i, z, flag=z > 20) for i, z in enumerate(values)]
    ranked = sorted(rows, key=lambda row: -(row.z_score or 0.0))  # stable
    summary = summarise(rows, top_k=30)
    assert summary.most_anomalous == ranked[:30]
    assert summary.flagged > 1000
    assert summary.flagged_rows == ranked[:1000]
    assert summarise(rows, top_k=2000).most_anomalous == ranked[:2000]
    assert summarise(rows, top_k=2000).flagged_rows == ranked[:1000]
    assert summarise(rows, top_k=0).most_anomalous == []
    few = summarise(rows[:5], top_k=30)
    assert few.most_anomalous == sorted(rows[:5], key=lambda row: -(row.z_score or 0.0))
    assert few.flagged_rows == [row for row in few.most_anomalous if row.flag]
    with pytest.raises(ValueError, match="top_k is -1; it cannot be negative"):
        Summary(top_k=-1)


def test_ranking_does_not_use_the_saturated_score() -> None:
    rows = [ScreenRow(str(z), z, z, 1.0, True, 1.64, None) for z in (30.0, 90.0, 60.0)]
    assert [row.path for row in summarise(rows).most_anomalous] == ["90.0", "60.0", "30.0"]


def test_errors_that_differ_in_the_file_alone_are_of_one_kind() -> None:
    rows = [failed(f"in/{i}.png", f"in/{i}.png does not exist; give another") for i in range(5)]
    rows += [failed(f"d{i}", f"{f'd{i}'!r} is a directory without image files") for i in range(3)]
    here = [failed(f"x{i}", f"{os.path.abspath(f'x{i}')!r} lies outside of '/a b'") for i in (1, 2)]
    assert kinds(*rows, *here) == [
        ("the file does not exist; give another", 5),
        ("the file is a directory without image files", 3),
        ("the file lies outside of '/a b'", 2),
    ]


def test_a_path_in_a_sentence_of_one_line_is_found() -> None:
    path = "two  spaces\n.png"
    assert kinds(failed(path, "two  spaces .png: no pixels")) == [("no pixels", 1)]
    assert kinds(failed(" ", "there is no image")) == [("there is no image", 1)]


def test_what_differs_within_a_kind_is_left_out() -> None:
    def broken(index: int, size: int, head: bytes, link: str) -> list[ScreenRow]:
        path = f"{index}.png"
        problems = {
            "{path} was cut off ({detail} of 9,000 bytes), is 8-bit": size,
            "{path} is no image, it begins with {detail}; PNG are read": head,
            "{path} is a link to {detail}, which does not exist": link,
            "{path} doesn't hold the image's pixels": None,
            "{path} is damaged ({detail})": OSError(f"only {size} bytes are left"),
            "{path} is damaged (OSError: {detail})": OSError("broken data stream"),
            "{path} cannot be opened: {detail}": OSError(5, f"Link of {size} parts", path),
        }
        errors = [
            ImageReadError(text, path=path, detail=detail) for text, detail in problems.items()
        ]
        return [failed(path, str(error), error.kind) for error in errors]

    first, second = broken(1, 17, b"it's", "/a/b c.png"), broken(2, 9, b"\"x'", "/d.png")
    assert kinds(*first) == [
        ("the file was cut off (17 of 9,000 bytes), is 8-bit", 1),
        ('the file is no image, it begins with b"it\'s"; PNG are read', 1),
        ("the file is a link to /a/b c.png, which does not exist", 1),
        ("the file doesn't hold the image's pixels", 1),
        ("the file is damaged (only 17 bytes are left)", 1),
        ("the file is damaged (OSError: broken data stream)", 1),
        ("the file cannot be opened: [Errno 5] Link of 17 parts: '1.png'", 1),
    ]
    assert kinds(*first, *second) == [
        ("the file was cut off (… of 9,000 bytes), is 8-bit", 2),
        ("the file is no image, it begins with …; PNG are read", 2),
        ("the file is a link to …, which does not exist", 2),
        ("the file doesn't hold the image's pixels", 2),
        ("the file is damaged (only …)", 2),
        ("the file is damaged (OSError: broken data stream)", 2),
        ("the file cannot be opened: Link of …", 2),
    ]


def test_rows_of_which_no_kind_is_known_are_grouped_by_their_sentences() -> None:
    """As those of a table that was read back."""
    rows = [failed(f"{i}.png", f"{i}.png is a link to /{i // 2}") for i in range(4)]
    assert kinds(*rows) == [("the file is a link to /0", 2), ("the file is a link to /1", 2)]


def test_rare_kinds_are_not_buried() -> None:
    rows = [failed(f"{i}.png", f"{i}.png does not exist") for i in range(10_000)]
    rows[5_000:5_000] = [failed(f"odd{i}.png", "the reader died") for i in range(3)]
    common, rare = summarise(rows).error_kinds
    assert (common.count, rare.count) == (10_000, 3)
    assert [row.path for row in rare.rows] == ["odd0.png", "odd1.png", "odd2.png"]
    assert [row.path for row in common.rows] == [f"{i}.png" for i in range(100)]


def test_endless_kinds_come_to_an_end() -> None:
    def words(index: int) -> str:
        return "".join(chr(97 + int(digit)) for digit in str(index))

    rows = [failed(f"{i}", f"{words(i)} went wrong") for i in range(1000)]
    found = summarise(rows).error_kinds
    assert len(found) == 51
    assert (found[0].reason, found[0].count) == ("other reasons", 950)
    assert sum(kind.count for kind in found) == 1000


def test_memory_is_four_bytes_a_row_and_some_rows() -> None:
    def rows(count: int) -> Iterator[ScreenRow]:
        for i in range(count):
            path = f"archive/of/some/length/{i:09d}.dcm"
            yield failed(path, f"{path} is empty") if i % 10 == 0 else scored(i, i % 997, True)

    def used(count: int) -> int:
        tracemalloc.start()
        summary = summarise(rows(count))
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert summary.count == count
        return size

    few, many = used(15_000), used(40_000)
    assert many - few < 25_000 * 8  # a row itself takes hundreds
