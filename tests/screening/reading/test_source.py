"""The images of a listing by their numbers, packed or not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from squid_fast.screening.reading.packing import pack
from squid_fast.screening.reading.source import Source
from tests.screening.levels import SIZE, write_levels


def levels_of(source: Source, first: int) -> list[int | None]:
    items = source.read(SIZE, workers=0, first=first)
    return [None if item.image is None else int(item.image[0, 0]) for item in items]


def test_images_are_numbered_across_files_and_packed_files(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    files = write_levels(tmp_path / "files", range(10))
    pack(files[1:6], tmp_path / "packed", SIZE, rows_per_shard=3, workers=0)
    first, second = sorted(str(path) for path in (tmp_path / "packed").iterdir())
    source = Source([first, files[0], second, second, "missing.png", files[9], first])
    levels = [1, 2, 3, 0, 4, 5, 4, 5, None, 9, 1, 2, 3]
    assert source.packed == {0: 3, 2: 2, 3: 2, 6: 3}
    assert len(source) == len(levels)
    for number in range(len(levels) + 3):
        assert levels_of(source, number) == levels[number:], number


def test_files_that_are_not_packed_need_no_arrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    source = Source(write_levels(tmp_path, range(4)))
    assert (len(source), source.packed) == (4, {})
    assert levels_of(source, 1) == [1, 2, 3]
    assert len(Source([])) == 0
    assert levels_of(Source([]), 0) == []
