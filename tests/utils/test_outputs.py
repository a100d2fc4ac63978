"""Places for results: what is followed, kept and refused."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from squid_fast.utils import outputs
from squid_fast.utils.atomic import replacing, write_json
from squid_fast.utils.outputs import check_distinct, check_file, check_folder


def write(path: Path, content: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(content)


def test_the_file_that_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "monday.csv", tmp_path / "latest.csv"
    (tmp_path / "middle.csv").symlink_to(target)
    link.symlink_to("middle.csv")
    for content in (b"first", b"second"):  # the first time, the link leads to nothing
        write(link, content)
        assert (link.is_symlink(), target.is_symlink()) == (True, False)
        assert target.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "latest.csv", "middle.csv"]
    assert os.listdir(tmp_path / "elsewhere") == ["monday.csv"]


def test_links_that_lead_back_to_themselves_are_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "a.csv", tmp_path / "b.csv"
    one.symlink_to(other)
    other.symlink_to(one)
    for call in (write, check_file):
        with pytest.raises(OSError, match=r"a.csv' is a symbolic link that leads back to itself"):
            call(one)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_hands_on_its_permissions(tmp_path: Path, mode: int) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.touch()
    old.chmod(mode)
    before = os.umask(0o027)
    try:
        write_json({}, old)
        write_json({}, new)
    finally:
        os.umask(before)
    assert stat.S_IMODE(old.stat().st_mode) == mode
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, read = tmp_path / "results.csv", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    check_file(pipe)
    write(pipe, b"rows")
    reader.join(10)
    assert read == [b"rows"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["results.csv"]


def test_where_no_file_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "kept.csv").touch()
    (tmp_path / "x.csv.new").mkdir()
    (tmp_path / "nowhere.csv").symlink_to("no/x.csv")
    check_file(tmp_path / "free.csv")
    access = os.access
    monkeypatch.setattr(  # root may write everywhere
        os, "access", lambda path, mode: "kept" not in str(path) and access(path, mode)
    )
    for name, kind, sentence in (
        ("folder", IsADirectoryError, "folder' is a folder; name the file that is to be in it"),
        ("no/x.csv", FileNotFoundError, "there is no folder .*no'; make it, or name another"),
        ("nowhere.csv", FileNotFoundError, "there is no folder .*no'; make it, or name another"),
        ("kept.csv", PermissionError, "you may not write to this file"),
        ("kept.csv/x.csv", FileNotFoundError, "there is no folder"),
        ("x.csv", IsADirectoryError, "x.csv.new' is in the way"),
        ("n" * 253, OSError, "File name too long"),
    ):
        with pytest.raises(kind, match=sentence):
            check_file(tmp_path / name)


def test_where_no_folder_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    for fits in (".", "new", "new/deep/run"):
        check_folder(tmp_path / fits)
    assert sorted(os.listdir(tmp_path)) == ["file", "gone"]
    for name, what in (("file", "file' is a file"), ("file/run", "file' is a file"),
                       ("gone/run", "gone' is a link to nothing")):  # fmt: skip
        with pytest.raises(NotADirectoryError, match=what):
            check_folder(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"you may not write to the folder"):
        check_folder(tmp_path / "new")


def test_one_file_by_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there.csv"
    there.touch()
    os.link(there, tmp_path / "hard.csv")
    (tmp_path / "soft.csv").symlink_to(there)
    (tmp_path / "free-link.csv").symlink_to("free.csv")
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "folder").mkdir()
    for one, other in (
        ("there.csv", "hard.csv"), ("soft.csv", "hard.csv"), ("there.csv", "self/there.csv"),
        ("free.csv", "folder/../free.csv"), ("free.csv", "free-link.csv"),
        ("free-link.csv", "free.csv"), ("self/free.csv", "./free.csv"),
    ):  # fmt: skip
        first, second = tmp_path / one, f"{tmp_path}/{other}"
        with pytest.raises(ValueError, match=r"report is .*, the same file as out; name another"):
            check_distinct({"out": first, "report": second})
        with pytest.raises(ValueError, match=r"out is .*, which would overwrite the input"):
            check_distinct({"out": first}, {"the input": ["other", second]})
    with pytest.raises(ValueError, match=r"report is .*, which lies in rows"):
        check_distinct({"rows": tmp_path / "rows", "report": tmp_path / "rows" / "r.html"})
    different = {"out": tmp_path / "free.csv", "report": tmp_path / "FREE.csv", "summary": None}
    check_distinct(different, {"the input": [there]})
    monkeypatch.setattr(outputs, "_ignores_case", lambda folder: True)  # as on macOS
    with pytest.raises(ValueError, match=r"report is .*, the same file as out"):
        check_distinct(different)
    check_distinct({"report": "/dev/null", "summary": "/dev/null"})
