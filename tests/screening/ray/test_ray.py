"""Screening through Ray Data: the same rows as on one machine, on a Ray of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ray", reason='Ray is not installed: pip install "squid-fast[ray]"')

import pyarrow as arrow
import pyarrow.parquet as parquet
import ray

from squid_fast import Scorer
from squid_fast.inference.bundle import BundleError, save_bundle
from squid_fast.screening import ScreenRow, screen, write_table
from squid_fast.screening.ray import images as ray_images
from squid_fast.screening.ray.ray import gather_table, score_dataset, screen_with_ray
from squid_fast.screening.reading import source
from squid_fast.screening.reading.packing import pack
from squid_fast.screening.reading.source import Source
from squid_fast.screening.results import arrow_batch
from tests.factories import tiny_bundle

# Batches of other sizes add in another order: a few units in the last place of float32.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # it would leave a token in the home folder
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(tiny_bundle("patch_error"), folder)
    return folder


def write_images(folder: Path, count: int, seed: int) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for index in range(count):
        pixels = generator.integers(0, 256, (30, 40), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{index:03}.png")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> list[Path]:
    """45 files of which nine are broken, two whose names are not UTF-8, one of them broken, 16
    packed and one that is missing.
    """
    folder = tmp_path_factory.mktemp("inputs")
    files = folder / "files"
    write_images(files, 45, seed=0)
    for index in range(0, 45, 5):
        (files / f"{index:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n" if index % 2 else b"")
    odd, broken = (files / os.fsdecode(name) for name in (b"caf\xe9.png", b"caf\xe9-2.png"))
    odd.write_bytes((files / "001.png").read_bytes())
    broken.write_bytes(b"")
    write_images(folder / "more", 16, seed=1)
    (folder / "more" / "007.png").write_bytes(b"no image")
    side = Scorer.load(bundle).image_size
    pack(folder / "more", folder / "packed", side, rows_per_shard=10, workers=1)
    return [files, folder / "packed", folder / "missing.png"]


@pytest.mark.usefixtures("cluster")
def test_the_rows_are_those_of_one_machine(
    tmp_path: Path, bundle: Path, inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs[0].parent)
    inputs = [Path(inputs[0].name), *inputs[1:]]  # relative: the cluster started elsewhere
    out = tmp_path / "out #1 %20"
    scorer = Scorer.load(bundle, precision="float32", device="cpu")
    rows = list(screen(scorer, inputs, batch_size=8))
    write_table(rows, tmp_path / "local.parquet")
    summary = screen_with_ray(
        bundle, inputs, out, batch_size=8, precision="float32", gpus_per_scorer=0
    )
    assert summary == {
        "count": 64,
        "scored": 52,
        "errors": 12,
        "flagged": sum(row.flag is True for row in rows),
        "threshold": scorer.threshold,
        "score_name": "patch_error",
        "left_out": {},
    }
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".parquet"]
    assert not out.with_name(out.name + ".partial").exists()
    gather_table(out, tmp_path / "gathered.parquet")
    local = parquet.read_table(tmp_path / "local.parquet")
    gathered = parquet.read_table(tmp_path / "gathered.parquet")
    assert gathered.schema == local.schema
    for name in ("path", "flag", "threshold", "error"):
        assert gathered[name].to_pylist() == local[name].to_pylist()
    for name in ("raw_score", "z_score", "anomaly_score"):
        np.testing.assert_allclose(gathered[name], local[name], rtol=ROUNDING)  # null is NaN
    odd = [path[-14:] for path in gathered["path"].to_pylist()[45:47]]
    assert odd == ["/caf\\xe9-2.png", "es/caf\\xe9.png"]


def test_a_folder_that_is_not_whole_gives_no_table(tmp_path: Path) -> None:
    folder, table = tmp_path / "out", tmp_path / "all.csv"
    folder.mkdir()
    for number, index in enumerate(([2, 0], [3, 1])):
        rows = [ScreenRow(str(i), None, None, None, None, 0.5, f"error {i}") for i in index]
        columns = arrow.Table.from_batches([arrow_batch(rows)])
        columns = columns.append_column("index", arrow.array(index))
        parquet.write_table(columns, folder / f"{number}.parquet")
    (folder / "_summary.json").write_text('{"count": 4}')
    gather_table(folder, table)
    lines = table.read_text().splitlines()
    assert lines[1:] == [f"{i},,,,,0.5,error {i}" for i in range(4)]

    for count, missing in ((5, None), (4, "1.parquet"), (3, None)):
        (folder / "_summary.json").write_text(f'{{"count": {count}}}')
        if missing:
            (folder / missing).unlink()
        with pytest.raises(ValueError, match=f"holds not the {count} rows of a whole run"):
            gather_table(folder, table)
    assert table.read_text().splitlines() == lines

    (folder / "0.parquet").unlink()
    (folder / "_summary.json").write_text('{"count": 0}')
    gather_table(folder, table)
    assert table.read_text().splitlines() == lines[:1]


@pytest.mark.usefixtures("cluster")
def test_a_dataset_is_scored_and_keeps_its_other_columns(bundle: Path) -> None:
    scorer = Scorer.load(bundle, precision="float32", device="cpu")
    side = scorer.image_size
    images = torch.randint(256, (5, 1, side, side), dtype=torch.uint8)
    pixels: list[bytes | None] = [image.numpy().tobytes() for image in images]
    table = arrow.table(
        {
            "patient": ["a", "b", "c", "d", "e", "f"],
            "path": [f"{index}.dcm".encode() for index in range(6)],
            "image": arrow.array([*pixels, None], arrow.binary()),
            "error": arrow.array([None] * 5 + ["withdrawn"], arrow.string()),
        }
    )
    dataset = score_dataset(
        ray.data.from_arrow(table), bundle, batch_size=4, precision="float32", gpus_per_scorer=0
    )
    rows = sorted(dataset.take_all(), key=lambda row: row["patient"])
    raw = scorer.score(images).raw.tolist()
    assert [row["raw_score"] for row in rows[:5]] == pytest.approx(raw, rel=ROUNDING)
    assert rows[5]["raw_score"] is None
    assert [row["path"] for row in rows] == [f"{index}.dcm" for index in range(6)]
    assert [row["error"] for row in rows] == [None] * 5 + ["withdrawn"]
    assert [row["patient"] for row in rows] == list("abcdef")
    assert rows[0].keys().isdisjoint({"image"})


@pytest.mark.usefixtures("cluster")
def test_what_cannot_work_is_refused_before_any_work(tmp_path: Path, bundle: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        screen_with_ray(bundle, tmp_path, out, batch_size=0)
    with pytest.raises(ValueError, match="scorers must be at least 1, not -1"):
        screen_with_ray(bundle, tmp_path, out, scorers=-1)
    with pytest.raises(ValueError, match="a scorer needs 2 CPUs and 0 GPUs, and decoding a CPU"):
        screen_with_ray(bundle, tmp_path, out, cpus_per_scorer=2, gpus_per_scorer=0)
    with pytest.raises(BundleError, match="is not a folder"):
        screen_with_ray(tmp_path / "none", tmp_path, out, gpus_per_scorer=0)
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.parquet").touch()
        with pytest.raises(FileExistsError, match=f"{name}' is there and no empty folder"):
            screen_with_ray(bundle, tmp_path, out)
        (tmp_path / name / "old.parquet").unlink()


def test_the_listing_is_cut_into_parts_that_keep_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "count_rows", lambda path: 10)
    files = ["a", "b.arrow", "c", "d", "e", "f", "g.arrow", "h.arrow", "i"]
    parts = [part.to_pydict() for part in ray_images.cut_listing(Source(files), 3)]
    assert parts == [
        {"index": [0, 1], "path": [b"a", b"b.arrow"], "rows": [1, 10]},
        {"index": [11, 12, 13], "path": [b"c", b"d", b"e"], "rows": [1, 1, 1]},
        {"index": [14, 15], "path": [b"f", b"g.arrow"], "rows": [1, 10]},
        {"index": [25], "path": [b"h.arrow"], "rows": [10]},
        {"index": [35], "path": [b"i"], "rows": [1]},
    ]
    assert list(ray_images.cut_listing(Source([]), 3)) == []


def test_a_packed_file_that_is_replaced_meanwhile_is_noticed(tmp_path: Path) -> None:
    write_images(tmp_path / "files", 4, seed=2)
    pack(tmp_path / "files", tmp_path / "packed", 32, workers=1)
    shard = str(tmp_path / "packed" / "shard-00000.arrow")
    (part,) = ray_images.cut_listing(Source([shard]), 3)
    (block,) = ray_images.decode(part, 32, 60.0, os.getcwd())
    assert block["index"].to_pylist() == [0, 1, 2, 3]
    assert [len(image) for image in block["image"].to_pylist()] == [32 * 32] * 4
    (tmp_path / "files" / "000.png").unlink()
    pack(tmp_path / "files", tmp_path / "fewer", 32, workers=1)
    os.replace(tmp_path / "fewer" / "shard-00000.arrow", shard)
    with pytest.raises(ValueError, match="shorter"):
        list(ray_images.decode(part, 32, 60.0, os.getcwd()))
