"""Files in, rows out: every input has its row, in order, whatever is wrong with it."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from squid_fast.screening import find_files, pipeline, screen

SIZE = 8


class MeanScorer:
    """z-score = ten times the mean grey value; notes the batches it was given."""

    image_size = SIZE
    score_name = "mean"
    threshold = 5.0
    false_positive_rate = 0.05

    def __init__(self) -> None:
        self.batches: list[int] = []

    def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
        assert images.shape[1:] == (1, SIZE, SIZE)
        assert images.dtype == torch.float32
        self.batches.append(len(images))
        raw = images.mean(dim=(1, 2, 3))
        z = 10 * raw
        rebuilt = images / 2 if reconstruction else None
        return SimpleNamespace(
            raw=raw, z_score=z, anomaly_score=z.sigmoid(), reconstruction=rebuilt
        )


def write_npy(path: Path, value: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.full((SIZE, SIZE), value, dtype=np.float32))
    return path


def fake_load(path: str, size: int) -> np.ndarray:
    """The grey value is the file's name: 0.25 is a quarter grey."""
    return np.full((size, size), float(os.path.basename(path)), dtype=np.float32)


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_image", fake_load)


def names(paths: Iterable[str], root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in paths]


# Finding files


def test_folders_give_image_files_and_those_without_suffix_sorted(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", "IM0001", "1.2.840.10008", ".hidden.png"):
        (tmp_path / name).touch()
    for folder in ("sub", ".cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.dcm").touch()
    found = find_files(tmp_path)
    assert names(found, tmp_path) == ["1.2.840.10008", "IM0001", "a.JPG", "b.png", "sub/c.dcm"]


def test_inputs_keep_their_order_and_a_file_comes_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    inputs: list[str | Path] = [tmp_path / "c.png", str(tmp_path), tmp_path / "x" / ".." / "a.png"]
    assert names(find_files(inputs), tmp_path) == ["c.png", "a.png", "b.png"]


def test_nothing_that_was_named_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    inputs = [str(tmp_path / n) for n in ("missing.png", "*.dcm", "**/*.dcm", "empty", "notes.txt")]
    assert find_files(inputs) == inputs


def test_globs(tmp_path: Path) -> None:
    for name in ("p1/x.dcm", "p1/deep/er/y.dcm", "p2/z.dcm", "p2/z.png", ".h/w.dcm", "v.dcm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern: str) -> list[str]:
        return names(find_files(f"{tmp_path}/{pattern}"), tmp_path)

    assert found("**/*.dcm") == ["p1/deep/er/y.dcm", "p1/x.dcm", "p2/z.dcm", "v.dcm"]
    assert found("p?/**/*.dcm") == ["p1/deep/er/y.dcm", "p1/x.dcm", "p2/z.dcm"]
    assert found("p[2-9]/*") == ["p2/z.dcm", "p2/z.png"]
    assert found("p1/**") == ["p1/deep/er/y.dcm", "p1/x.dcm"]
    assert found("**/de*") == ["p1/deep/er/y.dcm"]  # a matched folder is walked
    assert found("**/er/**/*") == ["p1/deep/er/y.dcm"]


def test_relative_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npy(tmp_path / "sub" / "a.npy", 0.0)
    monkeypatch.chdir(tmp_path)
    assert find_files("**/*.npy") == [os.path.join("sub", "a.npy")]
    assert find_files("**") == [os.path.join(".", "sub", "a.npy")]
    assert find_files("sub") == [os.path.join("sub", "a.npy")]


def test_existing_file_with_glob_characters_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "scan[1].png").touch()
    (tmp_path / "scan1.png").touch()
    assert names(find_files(tmp_path / "scan[1].png"), tmp_path) == ["scan[1].png"]


def test_folder_named_like_an_image(tmp_path: Path) -> None:
    (tmp_path / "empty.png" / "inner").mkdir(parents=True)
    (tmp_path / "full.png").mkdir()
    (tmp_path / "full.png" / "a.png").touch()
    assert names(find_files(tmp_path), tmp_path) == ["empty.png", "full.png/a.png"]


def test_link_loops_end_and_linked_folders_are_walked_once(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in (root / "a" / "1.png", outside / "2.png"):
        path.parent.mkdir(parents=True)
        path.touch()
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "above").symlink_to(tmp_path)
    (root / "0-again").symlink_to(root / "a")
    (root / "out").symlink_to(outside)
    (outside / "back").symlink_to(root)
    (root / "self.png").symlink_to("self.png")
    (root / "gone.png").symlink_to("nowhere")
    expected = ["a/1.png", "gone.png", "out/2.png", "self.png"]
    assert names(find_files(root), root) == expected
    assert names(find_files(f"{root}/**/*.png"), root) == expected


def test_folder_that_cannot_be_listed_gets_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npy(tmp_path / "a" / "1.npy", 0.5)
    locked = tmp_path / "locked.v2"
    locked.mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for inputs in (str(tmp_path), f"{tmp_path}/**/*.npy", f"{tmp_path}/*"):
        rows = list(screen(MeanScorer(), inputs))
        assert names((row.path for row in rows), tmp_path) == ["a/1.npy", "locked.v2"]
        assert rows[0].error is None
        assert "cannot be listed: Permission denied" in (rows[1].error or "")


# Screening


def test_scores_flags_and_order(tmp_path: Path) -> None:
    values = {"c": 0.25, "a": 0.75, "b": 0.5}
    paths = [str(write_npy(tmp_path / f"{name}.npy", value)) for name, value in values.items()]
    rows = list(screen(MeanScorer(), paths, batch_size=2))
    assert [row.path for row in rows] == paths
    assert [row.raw_score for row in rows] == [0.25, 0.75, 0.5]
    assert [row.z_score for row in rows] == [2.5, 7.5, 5.0]
    assert [row.flag for row in rows] == [False, True, False]  # not above: equal is no flag
    assert [row.anomaly_score for row in rows] == pytest.approx(
        [0.924142, 0.999447, 0.993307], abs=1e-6
    )
    assert all(row.error is None and row.threshold == 5.0 for row in rows)


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
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    np.save(folder / "nan.npy", np.full((SIZE, SIZE), np.nan, dtype=np.float32))
    np.save(folder / "cube.npy", np.zeros((5, 4, 3, 2), dtype=np.float32))
    (folder / os.fsdecode(b"caf\xe9.png")).write_text("not UTF-8")
    inside = find_files(folder)
    assert len(inside) == 13
    return [*inside, str(folder / "missing.png"), str(folder / "*.tif"), "nul\0byte.png"]


def test_every_broken_file_gets_a_row_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    bad = broken_files(tmp_path / "broken")
    good = [str(write_npy(tmp_path / "good" / f"{i}.npy", i / 32)) for i in range(len(bad))]
    mixed = [path for pair in zip(good, bad, strict=True) for path in pair]
    scorer = MeanScorer()
    rows = list(screen(scorer, mixed, batch_size=4, workers=2))

    assert [row.path for row in rows] == mixed
    assert [row.z_score for row in rows[::2]] == [pytest.approx(10 * i / 32) for i in range(16)]
    assert scorer.batches == [4, 4, 4, 4]  # errors take no place in a batch
    for row in rows[1::2]:
        assert row.error
        assert "\n" not in row.error
        assert len(row.error) > 15
        assert (row.raw_score, row.z_score, row.anomaly_score, row.flag) == (None,) * 4
        assert row.threshold == 5.0
    errors = {os.path.basename(row.path): row.error or "" for row in rows[1::2]}
    assert "is a directory" in errors["folder.png"]
    assert "no file matches the pattern" in errors["*.tif"]
    assert "does not exist" in errors["missing.png"]


def test_any_exception_of_one_file_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, size: int) -> np.ndarray:
        if path == "bug":
            raise ZeroDivisionError("two\nlines")
        if path == "shape":
            return np.zeros((size, size, 3), dtype=np.float32)
        return np.zeros((size, size), dtype=np.float32)

    monkeypatch.setattr(pipeline, "load_image", load)
    rows = list(screen(MeanScorer(), ["bug", "fine", "shape"]))
    assert rows[0].error == "ZeroDivisionError: two lines"
    assert rows[1].error is None
    assert rows[1].z_score == 0.0
    assert rows[2].error == "the image was read as (8, 8, 3), not as (8, 8)"


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_score_that_is_not_finite_is_an_error(bad: float) -> None:
    class Broken(MeanScorer):
        def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
            scores = super().score(images)
            scores.z_score[1] = bad
            return scores

    rows = list(screen(Broken(), ["0.1", "0.2", "0.3"]))
    assert [row.z_score for row in rows] == [pytest.approx(1.0), None, pytest.approx(3.0)]
    assert rows[1].flag is None
    assert rows[1].raw_score is None
    assert rows[1].anomaly_score is None
    assert "not a finite number" in (rows[1].error or "")


@pytest.mark.usefixtures("numbered")
def test_batches_are_filled_across_folders() -> None:
    scorer = MeanScorer()
    paths = [f"folder-{i}/0.{i:02d}" for i in range(11)]
    rows = list(screen(scorer, paths, batch_size=4))
    assert scorer.batches == [4, 4, 3]
    assert [row.path for row in rows] == paths


def test_look_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    started = 0
    lock = threading.Lock()

    def load(path: str, size: int) -> np.ndarray:
        nonlocal started
        with lock:
            started += 1
        return np.zeros((size, size), dtype=np.float32)

    monkeypatch.setattr(pipeline, "load_image", load)
    most = 0
    for done, _ in enumerate(screen(MeanScorer(), map(str, range(200)), 4, workers=3), start=1):
        with lock:
            most = max(most, started - done)
    assert done == started == 200
    assert most <= 2 * 4 + 3  # the batch just scored, and batch_size + workers ahead


def test_nothing_is_read_before_the_first_row_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(pipeline, "load_image", lambda path, size: read.append(path))
    screen(MeanScorer(), ["a", "b"])
    assert read == []


def test_long_run_of_errors_ends_a_batch() -> None:
    paths = [f"missing-{i}.png" for i in range(100)]
    batches = list(pipeline._batches([("0", np.zeros(1)), *((p, "bad") for p in paths)], 4))
    assert [len(batch) for batch in batches] == [16, *[1] * 85]


@pytest.mark.usefixtures("numbered")
def test_progress_counts_rows() -> None:
    calls: list[tuple[int, int]] = []
    screened = screen(
        MeanScorer(),
        ["0.1", "0.2", "not a number", "0.3"],
        batch_size=2,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    rows = list(screened)
    assert calls == [(2, 4), (3, 4), (4, 4)]
    assert rows[2].error == "ValueError: could not convert string to float: 'not a number'"


@pytest.mark.usefixtures("numbered")
def test_scorer_that_fails_ends_the_run_after_the_rows_before() -> None:
    class FailsLater(MeanScorer):
        def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
            if self.batches:
                raise RuntimeError("out of memory")
            return super().score(images)

    rows = screen(FailsLater(), ["0.1", "0.2", "0.3"], batch_size=2)
    assert [next(rows).path, next(rows).path] == ["0.1", "0.2"]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(rows)


@pytest.mark.usefixtures("numbered")
def test_wrong_number_of_scores_is_not_silent() -> None:
    class Short(MeanScorer):
        def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
            return super().score(images[1:])

    with pytest.raises(RuntimeError, match="1 scores for 2 images"):
        list(screen(Short(), ["0.1", "0.2"]))


def test_arguments_are_checked_at_the_call() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        screen(MeanScorer(), [], batch_size=0)
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        screen(MeanScorer(), [], workers=0)
    assert list(screen(MeanScorer(), [])) == []


@pytest.mark.parametrize("pattern", ["gone/**/*.png", "**/*.tiff", "*.tiff"])
def test_a_pattern_without_a_match_keeps_its_own_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_files(pattern) == [pattern]
