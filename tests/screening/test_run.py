"""A whole run: stopped, killed, resumed, refused, out of room; its table is right or not there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from squid_fast.screening import (
    COLUMNS,
    JournalError,
    check_output,
    check_outputs,
    pack,
    run,
    screen,
    screen_to_table,
)
from squid_fast.screening.journal import Journal
from tests.factories import MeanScorer
from tests.screening.levels import SIZE, write_level
from tests.screening.limits import file_size_limit
from tests.screening.test_results import FORMATS, read_table


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Thirty files, each with a grey value of its own, three of them broken."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(30):
        if number % 10 == 7:
            (folder / f"{number:02d}.npy").write_text("not an image")
        else:
            write_level(folder / f"{number:02d}.npy", number * 8)
    return folder


def expected(folder: Path) -> list[tuple[Any, ...]]:
    """Rows of all files, from their grey values."""
    rows: list[tuple[Any, ...]] = []
    for number in range(30):
        path, z = str(folder / f"{number:02d}.npy"), number * 80 / 255
        rows.append((path, None, None) if number % 10 == 7 else (path, pytest.approx(z), z > 5))
    return rows


def found(table: Path) -> list[tuple[Any, ...]]:
    rows = read_table(table)
    assert all((row["error"] is None) == (row["z_score"] is not None) for row in rows)
    return [(row["path"], row["z_score"], row["flag"]) for row in rows]


def rows_in(folder: Path) -> int:
    """How many rows an unfinished run has."""
    with Journal(folder) as journal:
        assert journal.run is not None
        return journal.count


def stop_after(batches: int) -> Callable[[], bool]:
    asked = itertools.count(1)
    return lambda: next(asked) >= batches


def stopped(images: Path, out: Path, batches: int = 2) -> None:
    """Leave an unfinished run of four rows a batch."""
    result = screen_to_table(
        MeanScorer(), images, out, batch_size=4, workers=0, should_stop=stop_after(batches)
    )
    assert result is None


@FORMATS
def test_one_row_for_each_file_and_their_figures(images: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"r{suffix}"
    steps: list[tuple[int, int]] = []
    summary = screen_to_table(MeanScorer(), images, out, batch_size=4, workers=0,
                              on_progress=lambda *step: steps.append(step))  # fmt: skip
    assert found(out) == expected(images)
    assert summary is not None
    assert (summary.count, summary.errors, summary.flagged) == (30, 3, 12)
    names = [os.path.basename(r.path) for kind in summary.error_kinds for r in kind.rows]
    assert names == ["07.npy", "17.npy", "27.npy"]
    assert steps[0] == (0, 30)
    assert steps[-1] == (30, 30)
    assert steps == sorted(steps)
    assert sorted(os.listdir(tmp_path)) == ["in", out.name]


@FORMATS
def test_stop_and_resume_give_the_table_of_an_uninterrupted_run(
    images: Path, tmp_path: Path, suffix: str
) -> None:
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"r{suffix}"
    screen_to_table(MeanScorer(), images, whole, workers=0)
    out.write_bytes(b"the last run")
    said: list[str] = []
    scorer = MeanScorer()
    summary = screen_to_table(
        scorer, images, out, batch_size=4, workers=0, should_stop=stop_after(2), say=said.append
    )
    assert summary is None
    folder = tmp_path / f"r{suffix}.partial"
    assert said == [f"stopped: 9 of 30 rows are safe in {str(folder)!r}; go on with --resume"]
    assert out.read_bytes() == b"the last run"
    assert rows_in(folder) == 9

    again = MeanScorer()
    summary = screen_to_table(
        again, images, out, resume=True, batch_size=5, workers=0, say=said.append
    )
    assert said[1] == (
        "going on behind 9 of 30 rows; files that came after the run was started are not in it"
    )
    assert found(out) == found(whole) == expected(images)
    assert sum(again.batches) == 27 - 8  # the first nine files hold eight images, scored before
    assert summary is not None
    assert (summary.count, summary.errors, summary.flagged) == (30, 3, 12)
    assert not folder.exists()


def test_resuming_takes_the_files_that_were_there(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    stopped(images, out)
    write_level(images / "00-new.npy", 0)
    (images / "20.npy").unlink()
    screen_to_table(MeanScorer(), images, out, resume=True, workers=0)
    rows = read_table(out)
    assert [row["path"] for row in rows] == [path for path, *_ in expected(images)]
    assert "does not exist" in rows[20]["error"]


def test_resuming_nothing_starts_at_the_beginning(images: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "r.csv"
    screen_to_table(MeanScorer(), images, out, resume=True, workers=0, say=said.append)
    assert said == [f"there is no unfinished run of {str(out)!r}: starting at the beginning"]
    assert found(out) == expected(images)


def test_an_unfinished_run_is_not_overwritten(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    check_output(out)
    stopped(images, out)
    scorer = MeanScorer()
    for refused in (partial(screen_to_table, scorer, images, workers=0), check_output):
        with pytest.raises(JournalError, match=r"holds an unfinished run of 'r\.csv': go on with"):
            refused(out=out)
    assert not scorer.batches
    check_output(out, resume=True)
    screen_to_table(MeanScorer(), images, out, resume=True, workers=0)
    assert found(out) == expected(images)


def test_a_run_that_was_killed_before_its_folder_was_removed_is_finished_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.csv"
    with monkeypatch.context() as patch:
        patch.setattr(run.Journal, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            screen_to_table(MeanScorer(), images, out, workers=0)
    assert found(out) == expected(images)
    assert rows_in(tmp_path / "r.csv.partial") == 30
    scorer = MeanScorer()
    summary = screen_to_table(scorer, images, out, resume=True, workers=0)
    assert not scorer.batches
    assert summary is not None
    assert summary.count == 30
    assert found(out) == expected(images)
    assert sorted(os.listdir(tmp_path)) == ["in", "r.csv"]


def test_another_run_is_not_mixed_in(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.csv"
    stopped(images, out)
    journal = tmp_path / "r.csv.partial" / "journal.sqlite"
    content = journal.read_bytes()
    others = {
        "model, its calibration or the precision is not the same": {"fingerprint": "mean-2"},
        "score was 'mean' and is 'median'": {"score_name": "median", "fingerprint": "median-1"},
        "threshold was 5.0 and is 4.5": {"threshold": 4.5},
    }
    for sentence, change in others.items():
        scorer = MeanScorer()
        vars(scorer).update(change)
        with pytest.raises(JournalError, match=rf"is of another run: the {sentence}\. Resume it"):
            screen_to_table(scorer, images, out, resume=True, workers=0)
        assert not scorer.batches
    for inputs in ([images, images / "00.npy"], str(tmp_path)):
        with pytest.raises(JournalError, match=r"the inputs was .* or delete that folder"):
            screen_to_table(MeanScorer(), inputs, out, resume=True, workers=0)
    assert journal.read_bytes() == content


def test_relative_inputs_belong_to_their_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.csv"
    monkeypatch.chdir(tmp_path)
    stopped(Path("in"), out)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(elsewhere)
        sentence = f"relative inputs start was '{tmp_path}' and is '{elsewhere}'"
        with pytest.raises(JournalError, match=re.escape(sentence)):
            screen_to_table(MeanScorer(), "in", out, resume=True, workers=0)
    screen_to_table(MeanScorer(), "in", out, resume=True, workers=0)
    assert [row["path"] for row in read_table(out)] == [f"in/{i:02d}.npy" for i in range(30)]


def test_one_input_more_among_many_is_another_run(tmp_path: Path) -> None:
    """Only the first inputs are kept by name; all of them are compared."""
    names = [str(tmp_path / f"{i}.npy") for i in range(100)]
    out = tmp_path / "r.csv"
    screen_to_table(MeanScorer(), names, out, batch_size=4, workers=0, should_stop=stop_after(1))
    with Journal(tmp_path / "r.csv.partial") as journal:
        assert journal.run is not None
        assert journal.run.inputs == names[:20]
        assert list(journal.files) == names
    with pytest.raises(JournalError, match="is of another run: the inputs"):
        screen_to_table(MeanScorer(), names[:99], out, resume=True, workers=0)


def test_names_that_are_not_utf8_go_through_a_resumed_run(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(8):
        write_level(folder / os.fsdecode(b"caf\xe9-%d.npy" % number), number)
    out = tmp_path / "r.jsonl"
    stopped(folder, out, 1)
    screen_to_table(MeanScorer(), folder, out, resume=True, workers=0)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [os.path.basename(row["path"]) for row in rows] == [
        f"caf\\xe9-{i}.npy" for i in range(8)
    ]
    assert [row["error"] for row in rows] == [None] * 8


def test_packed_files_are_resumed_in_their_middle(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    packed, out = tmp_path / "packed", tmp_path / "r.csv"
    pack(images, packed, SIZE, rows_per_shard=12, workers=0)
    extra = str(images / "03.npy")
    inputs = [extra, str(packed)]
    result = screen_to_table(
        MeanScorer(), inputs, out, batch_size=4, workers=0, should_stop=stop_after(5)
    )
    assert result is None
    second = packed / "shard-00001.arrow"
    whole = second.read_bytes()
    second.write_bytes(b"")
    with pytest.raises(JournalError, match="packed files among the inputs hold other numbers of"):
        screen_to_table(MeanScorer(), inputs, out, resume=True, workers=0)
    second.write_bytes(whole)
    scorer, said = MeanScorer(), list[str]()
    screen_to_table(scorer, inputs, out, resume=True, workers=0, say=said.append)
    assert said[0].startswith("going on behind 17 of 31 rows")
    assert sum(scorer.batches) == 28 - 16  # the first 17 rows hold one error
    assert found(out) == [expected(images)[3], *expected(images)]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("journal.sqlite", "cannot be read: .* Delete the folder to start"),
        ("run.json", r"holds 'run\.json', which is of no unfinished run of this version"),
    ],
)
def test_what_is_no_journal_is_refused_and_kept(
    images: Path, tmp_path: Path, name: str, sentence: str
) -> None:
    out, file = tmp_path / "r.csv", tmp_path / "r.csv.partial" / name
    stopped(images, out, 3)
    content = (file.parent / "journal.sqlite").read_bytes()
    damaged = content[:4096] + bytes(len(content) - 4096)
    file.write_bytes(damaged)
    for resume in (True, False):
        with pytest.raises(JournalError, match=sentence):
            screen_to_table(MeanScorer(), images, out, resume=resume, workers=0)
    with pytest.raises(JournalError, match=sentence):
        check_output(out)
    assert file.read_bytes() == damaged
    assert not out.exists()


def test_a_scorer_that_fails_loses_nothing_before(images: Path, tmp_path: Path) -> None:
    class FailsLater(MeanScorer):
        def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
            if sum(self.batches) >= 15:
                raise RuntimeError("device-side assert")
            return super().score(images)

    out = tmp_path / "r.csv"
    with pytest.raises(RuntimeError, match="device-side assert"):
        screen_to_table(FailsLater(), images, out, batch_size=7, workers=0)
    assert rows_in(tmp_path / "r.csv.partial") >= 15
    scorer = MeanScorer()
    screen_to_table(scorer, images, out, resume=True, batch_size=7, workers=0)
    assert sum(scorer.batches) <= 27 - 14
    assert found(out) == expected(images)


# No room


def test_full_disk_in_the_middle(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.parquet"
    with file_size_limit(60_000), pytest.raises(JournalError) as raised:
        screen_to_table(MeanScorer(), images, out, batch_size=4, workers=0)
    folder = tmp_path / "r.parquet.partial"
    count = rows_in(folder)
    assert 4 <= count < 30
    assert str(raised.value) == (
        f"{str(folder)!r} cannot be written: disk I/O error. {count} of 30 rows are safe in "
        f"{str(folder)!r}; once it can be, go on with --resume."
    )
    screen_to_table(MeanScorer(), images, out, resume=True, workers=0)
    assert found(out) == expected(images)


@FORMATS
def test_full_disk_while_the_table_is_made(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    out = tmp_path / f"r{suffix}"
    out.write_bytes(b"the last run")
    write = run.write_table

    def no_room(*arguments: Any) -> None:
        with file_size_limit(300):
            write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_table", no_room)
        with pytest.raises(JournalError) as raised:
            screen_to_table(MeanScorer(), images, out, workers=0)
    assert f"{str(out)!r} cannot be written: File too large. 30 of 30 rows are safe" in str(
        raised.value
    )
    assert out.read_bytes() == b"the last run"
    scorer = MeanScorer()
    screen_to_table(scorer, images, out, resume=True, workers=0)
    assert not scorer.batches
    assert found(out) == expected(images)


# Before any work


def test_tables_that_cannot_be_are_refused_before_any_work(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.csv").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "r.csv.partial").write_text("a file")
    cases: list[tuple[str, type[Exception], str]] = [
        ("r.xlsx", ValueError, r"'r\.xlsx' has the suffix '\.xlsx'"),
        ("d.csv", IsADirectoryError, "is a folder; name the file that is to be in it"),
        ("no/r.csv", FileNotFoundError, "there is no folder .*no'; make it, or name another"),
        ("locked/r.csv", PermissionError, "you may not write to the folder .*locked'"),
        ("full/r.csv", JournalError, "cannot be written: File exists"),
    ]
    access = os.access
    monkeypatch.setattr(  # root may write everywhere
        os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode)
    )
    for name, kind, sentence in cases:
        scorer = MeanScorer()
        with pytest.raises(kind, match=sentence):
            screen_to_table(scorer, images, tmp_path / name, workers=0)
        assert not scorer.batches
    assert sorted(os.listdir(tmp_path)) == ["d.csv", "full", "in", "locked"]


def test_a_table_never_replaces_what_is_read(images: Path, tmp_path: Path) -> None:
    picture = sorted(images.iterdir())[0]
    named, linked = tmp_path / "list.csv", tmp_path / "linked.csv"
    named.write_text("a.png")
    linked.symlink_to(picture)
    for out, inputs, sentence in (
        (named, [images, named], "which would overwrite the input"),
        (linked, [images], "linked.csv', an image; name another file for results"),
    ):
        with pytest.raises(ValueError, match=sentence):
            screen_to_table(MeanScorer(), inputs, out, workers=0)
    assert picture.read_bytes()[:4] in (b"\x93NUM", b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["in", "linked.csv", "list.csv"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_in_the_folder_that_is_screened_only_results_are_replaced(
    images: Path, tmp_path: Path, suffix: str
) -> None:
    out = images / f"labels{suffix}"
    listed: list[str | Path]
    for listed in ([images], [f"{tmp_path}/*/*.npy"], [f"{tmp_path}/**"]):
        out.write_text("id,label\n1,0\n")
        with pytest.raises(ValueError, match="a file among the inputs that holds no results"):
            screen_to_table(MeanScorer(), listed, out, workers=0)
        with pytest.raises(ValueError, match=r"report is .* a file among the inputs"):
            check_outputs({"out": tmp_path / "r.csv", "report": out}, listed)
    assert out.read_text() == "id,label\n1,0\n"
    out.write_text("")
    for _ in range(2):
        summary = screen_to_table(MeanScorer(), images, out, workers=0)
        assert found(out) == expected(images)
        assert summary is not None
        assert summary.left_out == {suffix: 1}  # and no file of the journal
    out.write_text("id,label\n1,0\n")
    other = sorted(images.iterdir())[0]
    screen_to_table(MeanScorer(), other, out, workers=0)  # which is what the caller asks for
    assert len(found(out)) == 1


def test_a_link_is_followed_and_stays(images: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    out, table = tmp_path / "latest.csv", tmp_path / "disk" / "monday.txt"
    out.symlink_to(table)
    screen_to_table(MeanScorer(), images, out, workers=0)
    assert out.is_symlink()
    assert found(out) == expected(images)
    assert os.listdir(tmp_path / "disk") == ["monday.txt"]


def test_arguments_out_of_range_leave_nothing_behind(images: Path, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"batch_size": 0}, {"workers": -1}, {"timeout": 0.0}]
    for argument in wrong:
        with pytest.raises(ValueError, match=f"{next(iter(argument))} must be"):
            screen_to_table(MeanScorer(), images, tmp_path / "r.csv", **argument)
    assert os.listdir(tmp_path) == ["in"]


def test_a_folder_that_may_not_be_written_to(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, **_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    sentence = "cannot be written: Read-only file system. No file has been scored yet."
    with pytest.raises(JournalError, match=sentence):
        screen_to_table(MeanScorer(), images, tmp_path / "r.csv", workers=0)


def test_the_rows_are_those_of_screen(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    screen_to_table(MeanScorer(), images, out, batch_size=4, workers=0)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    expected = list(screen(MeanScorer(), images, batch_size=4, workers=0))
    assert rows == [{name: getattr(row, name) for name in COLUMNS} for row in expected]
