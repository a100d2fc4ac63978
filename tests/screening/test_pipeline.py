"""Files in, rows out: every input has its row, in order, whatever is wrong with it."""

from __future__ import annotations

import logging
import os
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from squid_fast.screening import find_files, pipeline, screen
from squid_fast.screening.pipeline import score_batch
from squid_fast.screening.reading import source
from squid_fast.screening.reading.packing import pack
from squid_fast.screening.reading.worker import Decoded
from tests.factories import MeanScorer
from tests.screening.levels import SIZE, write_level, write_levels


@pytest.fixture
def levels(tmp_path: Path) -> list[str]:
    """Images of the grey levels 0 to 19."""
    return write_levels(tmp_path, range(20))


def test_folder_that_cannot_be_listed_gets_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_levels(tmp_path / "a", [9])
    locked = tmp_path / "locked.v2"
    locked.mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for inputs in (str(tmp_path), f"{tmp_path}/**/*.npy", f"{tmp_path}/*"):
        rows = list(screen(MeanScorer(), inputs, workers=0))
        assert [row.path for row in rows] == [f"{tmp_path}/a/09.npy", str(locked)]
        assert rows[0].error is None
        assert "cannot be listed: Permission denied" in (rows[1].error or "")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_scores_flags_and_order(tmp_path: Path, workers: int) -> None:
    named = {"c": 51, "a": 153, "b": 102}
    paths = [write_level(tmp_path / f"{name}.npy", level) for name, level in named.items()]
    scorer = MeanScorer()
    scorer.threshold = 4.0
    rows = list(screen(scorer, paths, batch_size=2, workers=workers))
    assert [row.path for row in rows] == paths
    assert [row.raw_score for row in rows] == [51, 153, 102]
    assert [row.z_score for row in rows] == [2, 6, 4]
    assert [row.flag for row in rows] == [False, True, False]  # not above: equal is no flag
    assert [row.anomaly_score for row in rows] == pytest.approx(
        [0.880797, 0.997527, 0.982014], abs=1e-6
    )
    assert all(row.error is None and row.threshold == 4.0 for row in rows)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims its size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IEND", b"")


def broken_files(folder: Path) -> list[str]:
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for kind in ("png", "jpg"):
        whole = folder / f"whole.{kind}"
        image.fromarray(noise).save(whole)
        (folder / f"truncated.{kind}").write_bytes(whole.read_bytes()[:600])
        whole.unlink()
    (folder / "text.png").write_text("this is no image\n")
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(png_header(100_000, 100_000))
    (folder / "garbage.dcm").write_bytes(bytes(range(256)) * 4)
    (folder / "IM0001").write_bytes(b"\x00" * 200)
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    np.save(folder / "nan.npy", np.full((SIZE, SIZE), np.nan, dtype=np.float32))
    np.save(folder / "cube.npy", np.zeros((5, 4, 3, 2), dtype=np.float32))
    (folder / os.fsdecode(b"caf\xe9.png")).write_text("not UTF-8")
    inside = find_files(folder)
    assert len(inside) == 13  # without IM0001, whose content nobody knows
    return [
        *inside,
        str(folder / "IM0001"),
        str(folder / "missing.png"),
        str(folder / "*.tif"),
        "nul\0byte.png",
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_broken_file_gets_a_row_with_its_reason(tmp_path: Path, workers: int) -> None:
    (tmp_path / "broken").mkdir()
    bad = broken_files(tmp_path / "broken")
    good = write_levels(tmp_path / "good", range(len(bad)))
    mixed = [path for pair in zip(good, bad, strict=True) for path in pair]
    scorer = MeanScorer()
    rows = list(screen(scorer, mixed, batch_size=4, workers=workers))

    assert [row.path for row in rows] == mixed
    assert [row.raw_score for row in rows[::2]] == list(range(17))
    assert scorer.batches == [4, 4, 4, 4, 1]  # errors take no place in a batch
    for row in rows[1::2]:
        assert row.error
        assert "\n" not in row.error
        assert len(row.error) > 15
        assert row.error_kind
        assert os.path.basename(row.path) not in row.error_kind
        assert (row.raw_score, row.z_score, row.anomaly_score, row.flag) == (None,) * 4
        assert row.threshold == 5.0
    errors = {os.path.basename(row.path): row.error or "" for row in rows[1::2]}
    assert "is a directory" in errors["folder.png"]
    assert "no file matches the pattern" in errors["*.tif"]
    assert "does not exist" in errors["missing.png"]
    assert "is a pipe" in errors["pipe.png"]
    assert "too many levels of symbolic links" in errors["loop.png"].lower()
    assert "too many pixels" in errors["bomb.png"]


def test_a_file_cut_short_after_it_was_listed(levels: list[str]) -> None:
    found = screen(MeanScorer(), levels[:4], workers=1)
    os.truncate(levels[1], 140)
    os.remove(levels[2])
    rows = list(found)
    assert [row.raw_score for row in rows] == [0, None, None, 3]
    assert "could not be decoded as NPY, it is damaged or truncated" in (rows[1].error or "")
    assert "does not exist" in (rows[2].error or "")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_score_that_is_not_finite_is_an_error(levels: list[str], bad: float) -> None:
    class Broken(MeanScorer):
        def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
            scores = super().score(images)
            scores.z_score[1] = bad
            return scores

    rows = list(screen(Broken(), levels[1:4], workers=0))
    assert [row.raw_score for row in rows] == [1, None, 3]
    assert rows[1].flag is None
    assert rows[1].z_score is None
    assert rows[1].anomaly_score is None
    assert "not a finite number" in (rows[1].error or "")


def test_batches_are_filled_across_folders(tmp_path: Path) -> None:
    scorer = MeanScorer()
    paths = [path for i in range(11) for path in write_levels(tmp_path / f"folder-{i}", [i])]
    rows = list(screen(scorer, paths, batch_size=4, workers=2))
    assert scorer.batches == [4, 4, 3]
    assert [row.path for row in rows] == paths
    assert [row.raw_score for row in rows] == list(range(11))


def test_two_batches_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def read(
        paths: Iterable[str], size: int, workers: int, look_ahead: int, timeout: float
    ) -> Iterator[Decoded]:
        seen.append((size, workers, look_ahead, timeout))
        yield from (Decoded(path, None, "bad") for path in paths)

    monkeypatch.setattr(source, "read_ahead", read)
    for batch_size, workers in ((8, 2), (1, 4)):
        rows = list(screen(MeanScorer(), ["a", "b"], batch_size, workers, timeout=7))
        assert [row.error for row in rows] == ["bad", "bad"]
    assert seen == [(SIZE, 2, 16, 7), (SIZE, 4, 16, 7)]


def test_a_batch_is_on_its_way_while_the_one_before_is_scored(levels: list[str]) -> None:
    events: list[tuple[str, int]] = []

    class Watched(MeanScorer):
        def prefetch(self, images: torch.Tensor) -> torch.Tensor:
            events.append(("prefetch", int(images[0, 0, 0, 0])))
            return images

        def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
            events.append(("score", int(images[0, 0, 0, 0])))
            return super().score(images)

    rows = list(screen(Watched(), levels[:9], batch_size=3, workers=1))
    assert [row.raw_score for row in rows] == list(range(9))
    order = [("prefetch", 0), ("prefetch", 3), ("score", 0), ("prefetch", 6), ("score", 3)]
    assert events == [*order, ("score", 6)]


def test_nothing_is_read_before_the_first_row_is_asked_for(tmp_path: Path) -> None:
    rows = screen(MeanScorer(), [tmp_path / "later.npy"], workers=1)
    path = write_level(tmp_path / "later.npy", 7)
    assert [(row.path, row.raw_score) for row in rows] == [(path, 7)]


def test_long_run_of_errors_ends_a_batch() -> None:
    paths = [f"missing-{i}.png" for i in range(100)]
    image = np.zeros((1, 1), dtype=np.uint8)
    failed = [Decoded(path, None, "bad") for path in paths]
    batches = list(pipeline._batches([Decoded("0", image), *failed], 4))
    assert [len(batch) for batch in batches] == [16, *[1] * 85]


def test_progress_counts_rows(levels: list[str]) -> None:
    calls: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        calls.append((done, total))

    named = [*levels[:2], "missing.png", levels[2]]
    rows = list(screen(MeanScorer(), named, 2, 1, note))
    assert calls == [(2, 4), (3, 4), (4, 4)]
    assert "does not exist" in (rows[2].error or "")
    calls.clear()
    list(screen(MeanScorer(), named, 2, 1, note, skip=1))
    assert calls == [(4, 4)]


def test_rows_go_on_behind_those_that_are_skipped(levels: list[str], tmp_path: Path) -> None:
    """Also within a packed file, which stands for its rows."""
    pack(levels[5:12], tmp_path / "packed", SIZE, workers=1, rows_per_shard=4)
    first, second = sorted(str(path) for path in (tmp_path / "packed").glob("*.arrow"))
    files = [levels[0], first, "missing.png", levels[1], second, levels[2]]
    every = list(screen(MeanScorer(), files, 3, 1))
    assert [row.raw_score for row in every] == [0, 5, 6, 7, 8, None, 1, 9, 10, 11, 2]
    assert [row.path for row in every[1:5]] == levels[5:9]
    for skip in range(len(every) + 2):
        rows = list(screen(MeanScorer(), files, 3, 0, skip=skip))
        assert rows == every[skip:], skip
    with pytest.raises(ValueError, match="skip must be at least 0, not -1"):
        screen(MeanScorer(), [], skip=-1)


def test_packed_images_alone_start_no_process(
    levels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(levels, tmp_path / "packed", SIZE, workers=1)
    monkeypatch.setattr(sys, "executable", "none")
    rows = list(screen(MeanScorer(), tmp_path / "packed", workers=1))
    assert [row.raw_score for row in rows] == list(range(20))


def test_scorer_that_fails_ends_the_run_after_the_rows_before(levels: list[str]) -> None:
    class FailsLater(MeanScorer):
        def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
            if self.batches:
                raise RuntimeError("weights went missing")
            return super().score(images)

    rows = screen(FailsLater(), levels[:5], batch_size=2, workers=1)
    assert [next(rows).path, next(rows).path] == levels[:2]
    with pytest.raises(RuntimeError, match="weights went missing"):
        next(rows)


def test_wrong_number_of_scores_is_not_silent(levels: list[str]) -> None:
    class Short(MeanScorer):
        def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
            return super().score(images[1:])

    with pytest.raises(RuntimeError, match="1 scores for 2 images"):
        list(screen(Short(), levels[:2], workers=0))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


class SmallScorer(MeanScorer):
    """Has memory for a few images."""

    def __init__(self, error: Exception, room: int, room_ahead: int) -> None:
        super().__init__()
        self.error, self.room, self.room_ahead = error, room, room_ahead
        self.failed: list[int] = []

    def prefetch(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.room_ahead:
            raise self.error
        return images

    def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
        if len(images) > self.room:
            self.failed.append(len(images))
            raise self.error
        return super().score(images)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("room_ahead", [3, 100])
def test_batches_are_halved_where_memory_runs_out(
    levels: list[str], error: Exception, room_ahead: int, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = SmallScorer(error, 3, room_ahead)
    with caplog.at_level(logging.WARNING, "squid_fast"):
        rows = list(screen(scorer, levels, batch_size=8, workers=0))
    assert [row.raw_score for row in rows] == list(range(20))
    assert scorer.failed == [8, 4]  # the smaller size is kept
    assert scorer.batches == [2] * 10
    assert [record.args[:2] for record in caplog.records if record.args] == [(8, 4), (4, 2)]
    assert "8 images at once take more memory than there is, 4 from now on" in caplog.text


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, RuntimeError("shapes differ")])
def test_what_no_smaller_batch_mends_is_raised(levels: list[str], error: Exception) -> None:
    scorer = SmallScorer(error, 0, 100)
    with pytest.raises(type(error)):
        list(screen(scorer, levels, batch_size=4, workers=0))
    assert scorer.failed == ([4] if "shapes" in str(error) else [4, 2, 1])


def test_score_batch_keeps_errors_in_their_places() -> None:
    image = np.full((SIZE, SIZE), 160, dtype=np.uint8)
    items = [
        Decoded("a", None, "bad: 1", "bad: …"),
        Decoded("b", image),
        Decoded("c", None, "worse"),
    ]
    rows = score_batch(MeanScorer(), items)
    assert [(row.path, row.raw_score, row.flag, row.error, row.error_kind) for row in rows] == [
        ("a", None, None, "bad: 1", "bad: …"),
        ("b", 160, True, None, None),
        ("c", None, None, "worse", None),
    ]
    assert score_batch(MeanScorer(), []) == []


def test_arguments_are_checked_at_the_call() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        screen(MeanScorer(), [], batch_size=0)
    with pytest.raises(ValueError, match="workers must be at least 0, not -1"):
        screen(MeanScorer(), [], workers=-1)
    with pytest.raises(ValueError, match="timeout must be more than 0"):
        screen(MeanScorer(), [], timeout=0)
    assert list(screen(MeanScorer(), [])) == []
