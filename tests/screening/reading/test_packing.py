"""Packed images: the same pixels and errors as from the files, whole or refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

arrow = pytest.importorskip("pyarrow")
CliRunner = pytest.importorskip("typer.testing").CliRunner

import squid_fast  # noqa: E402
from squid_fast.cli import app  # noqa: E402
from squid_fast.data import load_image  # noqa: E402
from squid_fast.screening.reading import packing  # noqa: E402
from squid_fast.screening.reading.packing import (  # noqa: E402
    count_rows,
    is_shard,
    pack,
    read_shard,
)
from squid_fast.screening.reading.worker import Decoded, decode  # noqa: E402
from tests.factories import tiny_bundle  # noqa: E402
from tests.screening.limits import file_size_limit  # noqa: E402

SIZE = 8


def write_images(folder: Path, count: int) -> list[Path]:
    """Images of another size than is packed, each grey value its own."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}.npy" for i in range(count)]
    for i, path in enumerate(paths):
        np.save(path, np.random.default_rng(i).random((20, 11), dtype=np.float32))
    return paths


def expected(path: str | Path, size: int = SIZE) -> np.ndarray:
    return (load_image(path, size) * 255 + 0.5).astype(np.uint8)


def comparable(rows: Sequence[Decoded]) -> list[tuple[str, str | bytes | None]]:
    return [(row.path, row.error if row.image is None else row.image.tobytes()) for row in rows]


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eleven rows in batches of four, row 5 an error."""
    monkeypatch.setattr(packing, "_BATCH_BYTES", 4 * SIZE**2)
    images = write_images(tmp_path / "images", 11)
    images[5].write_bytes(b"no image")
    pack(tmp_path / "images", tmp_path / "packed", SIZE, workers=1)
    return tmp_path / "packed" / "shard-00000.arrow"


def test_rows_are_the_files_in_order_with_pixels_or_errors(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 5)
    odd = tmp_path / "images" / os.fsdecode(b"caf\xe9.npy")
    shutil.copy(images[0], odd)
    broken = tmp_path / "images" / os.fsdecode(b"br\xf6ken.png")
    broken.write_bytes(b"no image")
    missing = tmp_path / "missing.png"
    inputs = [images[3], tmp_path / "images", missing]

    packed = pack(inputs, tmp_path / "packed", SIZE, rows_per_shard=3, workers=2)
    shards = sorted(map(str, (tmp_path / "packed").iterdir()))
    rows = [row for path in shards for row in read_shard(path, SIZE)]

    assert [Path(path).name for path in shards] == [f"shard-0000{i}.arrow" for i in range(3)]
    assert packed == packing.Packed(8, 2, 3, sum(map(os.path.getsize, shards)))
    assert list(map(count_rows, shards)) == [3, 3, 2]
    order = [images[3], *images[:3], images[4], broken, odd, missing]
    assert [row.path for row in rows] == [str(path) for path in order]
    for path, image, error, kind in rows:
        if path in (str(broken), str(missing)):
            assert image is None
            assert error is not None
            assert "\\xf6ken.png" in error if path == str(broken) else "does not exist" in error
            assert kind == decode(path, SIZE).error_kind
        else:
            assert error is kind is None
            assert image is not None
            assert image.dtype == np.uint8
            np.testing.assert_array_equal(image, expected(path))


def test_any_tool_that_knows_arrow_reads_a_shard(shard: Path) -> None:
    with arrow.ipc.open_file(shard) as reader:
        table = reader.read_all()
        assert reader.num_record_batches == 3
    assert table.schema.field("path").type == arrow.binary()
    assert table.schema.field("image").type == arrow.binary(SIZE**2)
    assert table.schema.field("error").type == arrow.string()
    assert table.schema.metadata[b"image_size"] == b"8"
    paths = [os.fsdecode(path) for path in table["path"].to_pylist()]
    assert [Path(path).name for path in paths] == [f"{i:03d}.npy" for i in range(11)]
    assert [i for i, image in enumerate(table["image"].to_pylist()) if image is None] == [5]
    assert [i for i, error in enumerate(table["error"].to_pylist()) if error is not None] == [5]
    assert table["image"][10].as_py() == expected(paths[10]).tobytes()


def test_a_shard_needs_none_of_its_files(shard: Path, tmp_path: Path) -> None:
    before = comparable(list(read_shard(str(shard), SIZE)))
    shutil.rmtree(tmp_path / "images")
    assert comparable(list(read_shard(str(shard), SIZE))) == before


def test_images_are_views_of_the_batch_that_was_read(shard: Path) -> None:
    first, second = (row.image for row in list(read_shard(str(shard), SIZE))[:2])
    assert first is not None
    assert second is not None
    assert second.ctypes.data - first.ctypes.data == SIZE**2
    assert not first.flags.writeable


def test_shard_of_nothing_but_errors(tmp_path: Path) -> None:
    packed = pack([tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "packed", SIZE, workers=1)
    assert (packed.files, packed.errors) == (2, 2)
    rows = list(read_shard(str(tmp_path / "packed" / "shard-00000.arrow"), SIZE))
    assert [row.path for row in rows] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert all("does not exist" in str(row.error) for row in rows)


def test_progress_counts_rows_and_ends_at_all(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_images(tmp_path / "images", 70)
    pack(tmp_path / "images", tmp_path / "packed", SIZE, rows_per_shard=30, workers=1,
         on_progress=lambda done, total: calls.append((done, total)))  # fmt: skip
    assert calls == [(64, 70), (70, 70)]


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be at most 16384, not 99999999999"):
        pack(tmp_path, tmp_path / "packed", 99_999_999_999)
    with pytest.raises(ValueError, match="size must be at least 1, not 0"):
        pack(tmp_path, tmp_path / "packed", 0)
    with pytest.raises(ValueError, match="rows_per_shard must be at least 1, not -1"):
        pack(tmp_path, tmp_path / "packed", SIZE, rows_per_shard=-1)
    assert not (tmp_path / "packed").exists()


# Ended runs


KILLED = """
import os, signal, sys
from squid_fast.screening import packing

packing._ROWS_PER_REPORT = 1

def stop(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    packing.pack(sys.argv[1], sys.argv[2], 8, rows_per_shard=4, workers=1, resume=True,
                 on_progress=stop)
"""


def test_killed_runs_leave_whole_shards_and_resume_to_the_same_bytes(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 19)
    images[9].write_bytes(b"no image")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    whole: list[list[str]] = []
    for rows in (3, 6, 19):
        command = [sys.executable, script, tmp_path / "images", tmp_path / "packed", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        whole.append(sorted(path.name for path in (tmp_path / "packed").glob("*.arrow")))
        assert all(count_rows(str(tmp_path / "packed" / name)) == 4 for name in whole[-1])
    names = [f"shard-0000{i}.arrow" for i in range(5)]
    assert whole == [[], names[:1], names[:4]]

    calls: list[tuple[int, int]] = []
    packed = pack(tmp_path / "images", tmp_path / "packed", SIZE, rows_per_shard=4, workers=1,
                  resume=True, on_progress=lambda *step: calls.append(step))  # fmt: skip
    once = pack(tmp_path / "images", tmp_path / "once", SIZE, rows_per_shard=4, workers=1)
    assert packed == once
    assert (packed.files, packed.errors, packed.shards) == (19, 1, 5)
    assert calls == [(19, 19)]
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == names
    for name in names:
        there, anew = tmp_path / "packed" / name, tmp_path / "once" / name
        assert there.read_bytes() == anew.read_bytes()


def test_resuming_what_is_finished_reads_nothing(shard: Path, tmp_path: Path) -> None:
    before = shard.read_bytes(), shard.stat().st_mtime_ns
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"changed")
    packed = pack(tmp_path / "images", shard.parent, SIZE, workers=1, resume=True)
    assert (shard.read_bytes(), shard.stat().st_mtime_ns) == before
    assert (packed.files, packed.errors) == (11, 1)


def test_resume_packs_a_shard_that_lost_its_end_anew(shard: Path, tmp_path: Path) -> None:
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-20])
    pack(tmp_path / "images", shard.parent, SIZE, workers=1, resume=True)
    assert shard.read_bytes() == whole


def test_shards_of_another_run_are_not_mixed(shard: Path, tmp_path: Path) -> None:
    images, out, before = tmp_path / "images", shard.parent, shard.read_bytes()
    with pytest.raises(FileExistsError, match="holds shards already"):
        pack(images, out, SIZE)
    with pytest.raises(ValueError, match="image_size 8, not 16"):
        pack(images, out, 16, resume=True)
    with pytest.raises(ValueError, match="rows_per_shard 8192, not 5"):
        pack(images, out, SIZE, rows_per_shard=5, resume=True)
    with pytest.raises(ValueError, match="another listing of files"):
        pack([images, tmp_path / "more.png"], out, SIZE, resume=True)
    with pytest.raises(ValueError, match="another listing of files"):
        pack([], out, SIZE, resume=True)
    shutil.copy(shard, out / "shard-00001.arrow")
    with pytest.raises(ValueError, match=r"00001\.arrow was packed from another listing"):
        pack(images, out, SIZE, resume=True)
    (out / "shard-00001.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match="is no Arrow file"):
        pack(images, out, SIZE, resume=True)
    assert shard.read_bytes() == before


def test_shards_inside_of_the_packed_folder_are_not_packed_again(tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    out = tmp_path / "packed"
    first = pack(tmp_path, out, SIZE, rows_per_shard=3, workers=1)
    (out / "shard-00001.arrow").unlink()
    assert pack(tmp_path, out, SIZE, rows_per_shard=3, workers=1, resume=True) == first
    assert first.files == 5


def test_full_disk_ends_in_an_error_and_leaves_whole_shards(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 9)
    out = tmp_path / "packed"
    pack(tmp_path / "images", tmp_path / "once", SIZE, rows_per_shard=4, workers=1)
    last, first = (os.path.getsize(tmp_path / "once" / f"shard-0000{i}.arrow") for i in (2, 0))
    assert last < first
    with file_size_limit(first - 1), pytest.raises(OSError, match="File too large"):
        pack(tmp_path / "images", out, SIZE, rows_per_shard=4, workers=0)
    assert list(out.iterdir()) == []
    assert pack(tmp_path / "images", out, SIZE, rows_per_shard=4, workers=1, resume=True).files == 9


# Damaged and foreign shards


def test_cut_anywhere_a_shard_keeps_its_number_of_rows(shard: Path) -> None:
    whole = shard.read_bytes()
    rows = comparable(list(read_shard(str(shard), SIZE)))
    kept = []
    for length in range(0, len(whole), 7):
        shard.write_bytes(whole[:length])
        cut = comparable(list(read_shard(str(shard), SIZE)))
        assert len(cut) == count_rows(str(shard))
        good = next((i for i, (path, _) in enumerate(cut) if path.startswith(str(shard))), 11)
        kept.append(good)
        assert cut[:good] == rows[:good]
        if len(cut) == 1:
            assert cut[0][0] == str(shard)
            assert "cannot be read as a shard" in str(cut[0][1]) or "no Arrow" in str(cut[0][1])
        for row, (path, error) in enumerate(cut[good:], start=good):
            if len(cut) == 11:
                assert path == f"{shard}#{row}"
                assert f"is damaged from row {good} on" in str(error)
    assert kept == sorted(kept)
    assert set(kept) == {0, 4, 8, 11}


def test_damage_anywhere_is_no_exception_and_loses_no_row(shard: Path) -> None:
    whole = shard.read_bytes()
    random = np.random.default_rng(0)
    changed = 0
    before = comparable(list(read_shard(str(shard), SIZE)))
    for _ in range(500):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            damaged[place] ^= int(random.integers(1, 256))
        shard.write_bytes(damaged)
        rows = comparable(list(read_shard(str(shard), SIZE)))
        assert len(rows) == count_rows(str(shard))
        assert all(value for _, value in rows)
        changed += rows != before
    assert changed > 200


def test_file_that_gets_shorter_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_BATCH_BYTES", 16 * 128**2)  # more than is read ahead
    images = write_images(tmp_path / "images", 40)
    pack(images, tmp_path / "packed", 128, workers=1)
    shard = str(tmp_path / "packed" / "shard-00000.arrow")
    rows = read_shard(shard, 128)
    got = [next(rows)]
    os.truncate(shard, 1000)
    got += rows
    assert comparable(got[:16]) == [(str(p), expected(p, 128).tobytes()) for p in images[:16]]
    assert [row.path for row in got[16:]] == [f"{shard}#{row}" for row in range(16, 40)]
    assert all("is damaged from row 16 on" in str(row.error) for row in got[16:])


def test_images_of_another_size_are_errors_that_name_both(shard: Path) -> None:
    good = list(read_shard(str(shard), SIZE))
    rows = list(read_shard(str(shard), 16))
    assert [row.path for row in rows] == [row.path for row in good]
    assert rows[5] == good[5]
    assert "8x8, and 16x16 is needed" in str(rows[0].error)


def write_arrow(path: Path, metadata: dict[str, str]) -> Path:
    schema = arrow.schema([("name", arrow.string())], metadata)
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_file(file, schema) as writer:
        writer.write_batch(arrow.record_batch([arrow.array(["x", "y"])], schema=schema))
    return path


def test_what_is_no_shard_is_one_row_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "folder.arrow").mkdir()
    os.mkfifo(tmp_path / "pipe.arrow")
    (tmp_path / "text.arrow").write_text("no Arrow at all")
    head = {"image_size": "8", "listing_sha256": "", "rows_per_shard": "2", "first_row": "0"}
    cases = {
        "folder.arrow": "is a directory",
        "pipe.arrow": "is no regular file",
        "missing.arrow": "does not exist",
        "*.arrow.arrow": "no file matches the pattern",
        "text.arrow": "is no Arrow file; it begins with b'no Arrow'",
        write_arrow(tmp_path / "foreign.arrow", {}).name: "did not write; it has the columns name",
        write_arrow(tmp_path / "new.arrow", {"squid_fast_shard": "2"}).name: (
            "is a shard of format 2; this version of squid_fast reads format 1"
        ),
        write_arrow(tmp_path / "lacking.arrow", {"squid_fast_shard": "1"}).name: "damaged head",
        write_arrow(
            tmp_path / "columns.arrow", {"squid_fast_shard": "1", "rows": "2"} | head
        ).name: "its columns do not fit",
    }
    for name, reason in cases.items():
        path = str(tmp_path / name)
        assert is_shard(path)
        assert count_rows(path) == 1
        (row,) = read_shard(path, SIZE)
        assert row.path == path
        assert reason in str(row.error)
    assert is_shard("A.ARROW")
    assert not is_shard("a.arrow.new")


# The command line


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was never trained."""
    folder = tmp_path_factory.mktemp("bundle")
    squid_fast.save_bundle(tiny_bundle(), folder)
    return folder


def squid(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_screening_packed_images_gives_the_rows_of_the_files_bit_for_bit(
    bundle: Path, tmp_path: Path
) -> None:
    images = write_images(tmp_path / "images", 21)
    images[7].write_bytes(b"no image")
    images[11].rename(tmp_path / "images" / os.fsdecode(b"caf\xe9.npy"))
    tables = [tmp_path / "files.csv", tmp_path / "shards.csv"]
    packed = json.loads(
        squid("pack", tmp_path / "images", "--out", tmp_path / "p", "--bundle", bundle, "--json")
    )
    assert (packed["files"], packed["errors"], packed["shards"]) == (21, 1, 1)
    assert packed["bytes"] == os.path.getsize(tmp_path / "p" / "shard-00000.arrow")
    for inputs, table in zip((tmp_path / "images", tmp_path / "p"), tables, strict=True):
        squid("screen", bundle, inputs, "--out", table, "--batch-size", 4, "--device", "cpu")
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert len(tables[0].read_text().splitlines()) == 22
    assert tables[0].read_text().count("no image") == 1


def test_lists_on_the_command_line(bundle: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)
    labels = tmp_path / "images" / "labels.csv"
    labels.write_text("image_path,label\n003.npy,0\n../images/001.npy,0\n../labels.csv,1\n")
    squid("screen", bundle, images[2], "--list", labels, "--out", tmp_path / "x.jsonl",
          "--device", "cpu")  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [os.path.abspath(row["path"]) for row in rows] == [
        *map(str, (images[2], images[3], images[1])),
        str(tmp_path / "labels.csv"),
    ]
    assert [row["error"] is None for row in rows] == [True, True, True, False]
    assert "lies outside of" in rows[3]["error"]

    (tmp_path / "list.txt").write_text("001.npy\n000.npy\n")
    root = tmp_path / "images"
    squid("pack", "--list", tmp_path / "list.txt", "--root", root, "--out", tmp_path / "p",
          "--size", SIZE)  # fmt: skip
    shard = str(tmp_path / "p" / "shard-00000.arrow")
    assert comparable(list(read_shard(shard, SIZE))) == [
        (str(path), expected(path).tobytes()) for path in (images[1], images[0])
    ]


def test_own_shards_are_no_input_by_whatever_path(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((8, 8), np.uint8))
    (tmp_path / "packed").mkdir()
    (tmp_path / "link").symlink_to("packed")
    for out in ("link", "packed", "link"):
        packed = pack(tmp_path, tmp_path / out, 8, workers=0, resume=True)
        assert (packed.files, packed.errors, packed.shards) == (1, 0, 1)
