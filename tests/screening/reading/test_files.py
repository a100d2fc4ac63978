"""Files of folders, globs and lists: every name has its row, no list leads out of its root."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from squid_fast.data import ImageReadError
from squid_fast.data.listing import LeftOut
from squid_fast.screening import find_files, read_list
from squid_fast.screening.reading.files import check_is_file


def explain_no_file(path: str) -> str | None:
    """Why a path stands for no file, or None."""
    try:
        check_is_file(path)
    except ImageReadError as error:
        return str(error)
    return None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for name in ("b.png", "a.png", "sub/c.png", "scan[1].png", "scan1.png"):
        (root / name).touch()
    (tmp_path / "secret.png").touch()
    return root


def names(paths: list[str], root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in paths]


def test_in_folders_the_content_decides_where_the_name_does_not(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "shard-00000.arrow", "DICOMDIR",
                 "shard-00001.arrow.new", "x.ARROW", "IM0002", "Thumbs.db"):  # fmt: skip
        (tmp_path / name).touch()
    for name in ("IM0001", "1.2.840.10008", "scan.xyz", "DICOMDIR"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(200))
    for folder in ("sub", ".cache", "__MACOSX", "@eaDir"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.dcm").touch()
    os.mkfifo(tmp_path / "pipe")
    left_out = LeftOut()
    found = find_files([tmp_path, tmp_path / "sub"], left_out)
    assert names(found, tmp_path) == [
        "1.2.840.10008", "IM0001", "a.JPG", "b.png", "scan.xyz", "shard-00000.arrow", "sub/c.dcm",
        "x.ARROW",
    ]  # fmt: skip
    assert left_out.counts == {"without suffix": 3, ".txt": 1, ".new": 1, ".db": 1}


def test_files_that_are_named_are_not_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "notes.txt", "more.txt"):
        (tmp_path / name).touch()
    left_out = LeftOut()
    found = find_files([tmp_path / "notes.txt", tmp_path, f"{tmp_path}/**"], left_out)
    assert names(found, tmp_path) == ["notes.txt", "a.png"]
    assert left_out.counts == {".txt": 1}


def test_inputs_keep_their_order_and_a_file_comes_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    inputs: list[str | Path] = [tmp_path / "c.png", str(tmp_path), tmp_path / "x" / ".." / "a.png"]
    assert names(find_files(inputs), tmp_path) == ["c.png", "a.png", "b.png"]


def test_nothing_that_was_named_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.txt").touch()
    inputs = ["missing.png", "*.dcm", "**/*.dcm", "gone/**/*.png", "empty", "notes.txt"]
    assert find_files(inputs) == inputs
    inputs = [str(tmp_path / name) for name in inputs]
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
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.npy").touch()
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


# Lists


@pytest.mark.parametrize(
    "content",
    [
        b"b.png\nsub/c.png\na.png\nmissing.png\ncaf\xe9.png\n",
        b"\xef\xbb\xbfb.png\r\n\r\nsub/c.png\r\n  \r\na.png\r\nmissing.png\r\ncaf\xe9.png",
        b"b.png\0sub/c.png\0./sub/../a.png\0missing.png\0caf\xe9.png\0",
    ],
    ids=["lines", "windows", "print0"],
)
def test_text_lists_keep_order_and_bytes(root: Path, content: bytes) -> None:
    (root / "list.txt").write_bytes(content)
    listed = read_list(root / "list.txt")
    expected = ["b.png", "sub/c.png", "a.png", "missing.png", os.fsdecode(b"caf\xe9.png")]
    assert listed == [str(root / name) for name in expected]
    assert find_files([*listed, *listed]) == listed
    assert [explain_no_file(path) for path in listed] == [None] * 5


def test_names_of_find_print0_may_hold_newlines(root: Path) -> None:
    (root / "two\nlines.png").touch()
    (root / "list").write_bytes(b"two\nlines.png\0a.png\0")
    assert names(read_list(root / "list"), root) == ["two\nlines.png", "a.png"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_lists_of_windows(root: Path, encoding: str) -> None:
    (root / "list.txt").write_bytes("b.png\r\nsub/c.png\r\n\r\nä.png\r\n".encode(encoding))
    assert names(read_list(root / "list.txt"), root) == ["b.png", "sub/c.png", "ä.png"]
    (root / "list.csv").write_bytes("label;filename\r\n0;b.png\r\n1;ä.png\r\n".encode(encoding))
    assert names(read_list(root / "list.csv"), root) == ["b.png", "ä.png"]


def test_a_name_is_looked_for_in_other_spellings_too(root: Path) -> None:
    for name in ("caf\xe9.png", "u\u0308.png", os.fsdecode(b"na\xefve.png"), "end .png "):
        (root / name).touch()
    content = b"caf\xe9.png\n\xc3\xbc.png\nna\xefve.png\nb.png   \nend .png \n"
    (root / "list.txt").write_bytes(content)
    found = ["caf\xe9.png", "u\u0308.png", os.fsdecode(b"na\xefve.png"), "b.png", "end .png "]
    assert names(read_list(root / "list.txt"), root) == found
    (root / "list.csv").write_bytes(b"path\n" + content)
    assert names(read_list(root / "list.csv"), root) == found


def test_names_in_quotation_marks_and_addresses(root: Path) -> None:
    (root / "two words.png").touch()
    (root / "'kept'").touch()
    (root / "one.txt").write_text(
        f"\"two words.png\"\n'a.png'\n'kept'\nfile://{root}/two%20words.png\n"
    )
    (root / "list.txt").write_text(f'{(root / "one.txt").read_text()}\ufeffb.png\n"\n')
    expected = ["two words.png", "a.png", "'kept'", "two words.png", "b.png", '"']
    assert names(read_list(root / "list.txt"), root) == expected


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PAR1\x15\x04\x15", "no text"),
        (b"PK\x03\x04\x14\0\x06", "no text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "no text"),
        (b"SQLite format 3\0\x10\0\x01\x01", "no text"),
        (b'{"path": "a.png"}\n{"path": "b.png"}\n', "JSON"),
        (b'\n[\n  "a.png"\n]', "JSON"),
    ],
)
def test_lists_that_are_no_lists_are_refused(root: Path, content: bytes, what: str) -> None:
    for name in ("list.txt", "list.csv", "results.parquet"):
        (root / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"the list '\S*{name}' is {what}; give text"):
            read_list(root / name)
    (root / "list.txt").write_text("{a}.png\n[b].png\n")
    assert names(read_list(root / "list.txt"), root)[0] == "{a}.png"


def test_names_may_hold_control_characters(root: Path) -> None:
    (root / "list.txt").write_bytes(b"bell\x07.png\n\x1b[31m.png\n")
    assert names(read_list(root / "list.txt"), root) == ["bell\x07.png", "\x1b[31m.png"]


def test_lines_of_old_macs_and_carriage_returns_in_names(root: Path) -> None:
    (root / "list.txt").write_bytes(b"b.png\ra.png\r")
    assert names(read_list(root / "list.txt"), root) == ["b.png", "a.png"]
    (root / "Icon\r").touch()
    (root / "list.csv").write_bytes(b'path\n"Icon\r"\na.png\n')
    assert names(read_list(root / "list.csv"), root) == ["Icon\r", "a.png"]


@pytest.mark.parametrize(
    ("content", "file"),
    [
        (b"\xef\xbb\xbflabel, Image_Path\r\n0,b.png\r\n\r\n1,sub/c.png\r\n", "labels.csv"),
        (b"Image_Path\tlabel\nb.png\t0\nsub/c.png\t1\n", "labels.tsv"),
        (b"label|image_path\n0|b.png\n1|sub/c.png\n", "labels.csv"),
        (b"sep=;\r\nimage_path;label\r\nb.png;0\r\nsub/c.png;1\r\n", "labels.CSV"),
        (b'filename;a,b\n"b.png";"0,1"\n"sub/c.png";2\n', "labels.csv"),
    ],
)
def test_tables_give_their_image_paths(root: Path, content: bytes, file: str) -> None:
    (root / file).write_bytes(content)
    assert names(read_list(root / file), root) == ["b.png", "sub/c.png"]


def test_a_cell_may_hold_any_character(root: Path) -> None:
    content = 'label,image_path\n0,"b,;\t|.png"\n,"a\u2028.png"\n1,"say ""hi""\n.png"\n'
    (root / "labels.csv").write_bytes(content.encode())
    expected = ["b,;\t|.png", "a\u2028.png", 'say "hi"\n.png']
    assert names(read_list(root / "labels.csv"), root) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"scan,label\na.png,0\n", "lacks the column image_path; it has scan, label"),
        (b"scan;label\na.png;0\n", "lacks the column image_path; it has scan, label"),
        (b"", "lacks the column image_path; it has none"),
        (b"image_path,label\na.png,0\n,1\n", "line 3 has no image_path"),
        (b"label,image_path\n0,a.png\n1\n", "line 3 has no image_path"),
        (b"image_path\na.png\0b.png\n", "holds NUL bytes"),
        (b"image_path\n" + b"x" * 200_000 + b"\n", "line 2 cannot be read as CSV"),
    ],
)
def test_tables_that_do_not_name_images_are_refused(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_list(tmp_path / "labels.csv")


def test_standard_input_is_relative_to_the_current_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"sub/c.png\n../x.png\n")))
    inside, outside = read_list("-")
    assert inside == "sub/c.png"
    assert explain_no_file(outside) == f"{str(root.parent / 'x.png')!r}, named in a list, lies " + (
        "outside of '.'"
    )


def test_root_may_be_another_folder_than_the_lists(root: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"a.png\n{root / 'sub' / 'c.png'}\n{tmp_path}/secret.png\n")
    a, c, secret = read_list(tmp_path / "list.txt", root)
    assert (a, c) == (str(root / "a.png"), str(root / "sub" / "c.png"))
    assert "lies outside" in (explain_no_file(secret) or "")
    everything = read_list(tmp_path / "list.txt", "/")
    assert everything[1:] == [str(root / "sub" / "c.png"), str(tmp_path / "secret.png")]


def test_names_that_leave_the_root_are_explained_and_nothing_else_is(
    root: Path, tmp_path: Path
) -> None:
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "out").symlink_to(tmp_path)
    (root / "in").symlink_to(root / "sub")
    (root / "inner.png").symlink_to("sub/c.png")
    (root / "loop.png").symlink_to("loop.png")
    bad = [
        "../secret.png",
        "sub/../../secret.png",
        str(tmp_path / "secret.png"),
        "/etc/hostname",
        "link.png",
        "out/secret.png",
        "../root-2/a.png",
        "../secret.png/./../root/././b.png/../../../secret.png",
        "..",
        "../*",
    ]
    good = ["a.png", f"../{root.name}/b.png", "in/c.png", "inner.png", "loop.png", "gone.png"]
    mixed = [name for pair in zip(bad, [*good, *good], strict=False) for name in pair]
    (root / "list.txt").write_text("\n".join(mixed))
    listed = read_list(root / "list.txt")
    assert len(listed) == 2 * len(bad)
    reasons = [explain_no_file(path) for path in listed]
    assert reasons[1::2] == [None] * len(bad)
    for name, reason in zip(bad, reasons[::2], strict=True):
        place = os.path.abspath(root / name)
        assert reason == f"{place!r}, named in a list, lies outside of {str(root)!r}"
    places = [os.path.abspath(path) for path in listed]
    assert list(map(os.path.abspath, find_files(listed))) == list(dict.fromkeys(places))


def test_refused_name_does_not_hide_the_file_of_the_same_name_inside(root: Path) -> None:
    (root / "etc").mkdir()
    (root / "etc" / "hostname").touch()
    (root / "list.txt").write_text("/etc/hostname\netc/hostname\n")
    outside, inside = find_files(read_list(root / "list.txt"))
    assert "lies outside" in (explain_no_file(outside) or "")
    assert inside == str(root / "etc" / "hostname")


def test_a_name_stands_for_one_file(root: Path) -> None:
    (root / "list.txt").write_text("sub\n.\n*.png\nscan[1].png\nscan[2].png\n")
    listed = read_list(root / "list.txt")
    assert find_files(listed) == listed
    sub, here, pattern, scan, no_scan = listed
    assert explain_no_file(sub) == f"{str(root / 'sub')!r} is a directory; a list names files"
    assert explain_no_file(here) == f"{str(root)!r} is a directory; a list names files"
    assert scan == str(root / "scan[1].png")
    for missing in (pattern, no_scan):
        assert explain_no_file(missing) is None
        assert not os.path.exists(missing)


def test_list_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        read_list(tmp_path / "gone.txt")
    with pytest.raises(IsADirectoryError):
        read_list(tmp_path)
    (tmp_path / "empty.txt").touch()
    assert read_list(tmp_path / "empty.txt") == []
