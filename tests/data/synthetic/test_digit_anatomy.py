"""Grids of digits: their order, their anomalies, and nothing else that differs."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squid_fast.data import (
    KINDS,
    DigitAnatomy,
    DigitSourceError,
    find_records,
    load_images,
    write_digit_anatomy,
)
from squid_fast.data.synthetic.digit_anatomy import _spoil
from squid_fast.data.synthetic.handwriting import load_mnist, read_idx

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

CELL = 16


@cache
def digits(split: str = "train") -> DigitAnatomy:
    return DigitAnatomy(cell=CELL, split=split)


def cells(images: torch.Tensor) -> torch.Tensor:
    """[n, 1, 3c, 3c] -> [n, 9, c, c]."""
    side = images.shape[-1] // 3
    return images.reshape(-1, 3, side, 3, side).transpose(2, 3).reshape(-1, 9, side, side)


def test_normal_grids() -> None:
    grids = digits().normal(300, seed=3)
    assert grids.images.dtype == torch.uint8
    assert grids.images.shape == (300, 1, 48, 48)
    assert grids.labels.tolist() == [0] * 300
    assert grids.kinds == ["normal"] * 300
    assert not grids.masks.any()
    ink = cells(grids.images)
    assert (ink.flatten(2).amax(2) > 100).all()  # a digit in every cell
    assert len(ink.flatten(0, 1).flatten(1).unique(dim=0)) > 2600  # each drawn anew
    # on average, cell i is digit i + 1: nearest mean of the same digits drawn elsewhere
    means = cells(digits("val").normal(300, seed=4).images).double().mean(0).flatten(1)
    here = ink.double().mean(0).flatten(1)
    assert torch.cdist(here, means).argmin(1).tolist() == list(range(9))


def test_scale_moves_the_size_of_digits() -> None:
    # the width of the vertical extent of ink: 8 of 12 pixels of the frame, 0.6 to 1.3 times
    ink = cells(DigitAnatomy(cell=48).normal(200, seed=0).images)
    rows = (ink > 127).any(-1).sum(-1).double() / 48
    assert rows.min() > 0.6 * 8 / 12 - 0.1
    assert rows.max() < 1.3 * 8 / 12 + 0.1
    assert rows.max() / rows.min() > 1.8


@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 50), seed=st.integers(0, 2**40), kind=st.sampled_from(KINDS))
def test_only_the_mask_differs_from_the_normal_grid(n: int, seed: int, kind: str) -> None:
    normal = digits().normal(n, seed)
    spoilt = digits().anomalous(n, seed, [kind])
    differs = normal.images != spoilt.images
    assert not (differs & ~spoilt.masks).any()
    masked = cells(spoilt.masks.byte())
    whole = masked.flatten(2).amin(2)
    assert torch.equal(whole, masked.flatten(2).amax(2))  # whole cells
    assert (whole.sum(1) == (2 if kind == "swapped" else 1)).all()
    assert spoilt.labels.tolist() == [1] * n
    assert spoilt.kinds == [kind] * n
    if kind == "missing":
        assert not spoilt.images[spoilt.masks].any()
    assert differs.flatten(1).any(1).all()  # every anomaly can be seen


def test_kinds_in_equal_shares() -> None:
    assert Counter(digits().anomalous(400, 0).kinds) == dict.fromkeys(KINDS, 100)
    counts = Counter(digits().anomalous(10, 0).kinds)
    assert max(counts.values()) - min(counts.values()) == 1
    assert set(digits().anomalous(10, 0, ("missing", "foreign")).kinds) == {"missing", "foreign"}
    for kinds in ((), ("missing", "rotated")):
        with pytest.raises(ValueError, match="choose among missing"):
            digits().anomalous(4, 0, kinds)


def affected(kind: str, n: int = 2000) -> torch.Tensor:
    """How often each cell is affected."""
    return cells(digits().anomalous(n, 5, [kind]).masks.byte())[:, :, 0, 0].long().sum(0)


def test_every_cell_can_be_affected_but_only_some_flipped() -> None:
    for kind in ("missing", "swapped", "foreign"):
        counts = affected(kind)
        expected = counts.sum() / 9
        assert ((counts - expected).abs() < 6 * expected.sqrt()).all(), kind
    assert (affected("flipped").nonzero()[:, 0] + 1).tolist() == [2, 3, 5, 6, 7, 9]


def test_flips_mirror_and_swaps_exchange() -> None:
    source = DigitAnatomy(cell=CELL)
    normal, flipped = source.normal(200, 7), source.anomalous(200, 7, ["flipped"])
    before = normal.images[flipped.masks].reshape(-1, CELL, CELL).int()
    after = flipped.images[flipped.masks].reshape(-1, CELL, CELL).int()
    left_right = (after - before.flip(2)).abs().flatten(1).amax(1) <= 1
    upside_down = (after - before.flip(1)).abs().flatten(1).amax(1) <= 1
    assert (left_right ^ upside_down).all()  # one or the other, and no drawing is its own mirror
    assert left_right.any()
    assert upside_down.any()


def test_foreign_cells_hold_every_other_digit() -> None:
    plan = digits()._plan(4000, torch.Generator().manual_seed(0))
    before = plan.digit.clone()
    _spoil(plan, ["foreign"] * 4000, torch.Generator().manual_seed(1))
    changed = plan.digit != before
    assert (changed.sum(1) == 1).all()
    assert torch.equal(changed, plan.affected)
    seen = set(zip(before[changed].tolist(), plan.digit[changed].tolist(), strict=True))
    assert seen == {
        (right, wrong) for right in range(1, 10) for wrong in range(10) if right != wrong
    }


def test_seeds() -> None:
    first, second = DigitAnatomy(cell=CELL), DigitAnatomy(cell=CELL)
    a, b = first.anomalous(40, 11), second.anomalous(40, 11)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.masks, b.masks)
    assert not torch.equal(a.images, first.anomalous(40, 12).images)
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(first.anomalous(40, generator).images, a.images)
    assert not torch.equal(first.anomalous(40, generator).images, a.images)
    # without a seed: a sequence of its own, the same in every run
    assert torch.equal(first.normal(5).images, second.normal(5).images)
    assert not torch.equal(first.normal(5).images, DigitAnatomy(cell=CELL).normal(5).images)


def test_threads_do_not_change_the_bits() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = digits().normal(600, 2).images
        torch.set_num_threads(2)
        two = digits().normal(600, 2).images
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


def test_splits_are_disjoint_and_whole() -> None:
    parts = [digits(split).drawings.tolist() for split in ("train", "val", "test")]
    everything = [number for part in parts for number in part]
    assert sorted(everything) == list(range(1797))
    assert [round(len(part) / 1797, 2) for part in parts] == [0.6, 0.2, 0.2]
    again = DigitAnatomy(cell=CELL, seed=1).drawings.tolist()
    assert sorted(again) != sorted(parts[0])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="cell is 3"):
        DigitAnatomy(cell=3)
    with pytest.raises(ValueError, match="split is 'dev'"):
        DigitAnatomy(split="dev")
    with pytest.raises(ValueError, match="n is -1"):
        digits().normal(-1)
    with pytest.raises(DigitSourceError, match="does not exist"):
        DigitAnatomy("nowhere")


def test_as_image_set() -> None:
    grids = digits().anomalous(4, 0)
    images = grids.as_image_set()
    assert len(images) == 4
    assert torch.equal(images.labels, grids.labels)
    assert images.paths == [f"{kind}/{i:05d}" for i, kind in enumerate(grids.kinds)]
    torch.testing.assert_close(images.batch([2])[0] * 255, grids.images[2].float())


def test_written_data_reads_back(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    table = write_digit_anatomy(
        tmp_path / "set", {"train": (6, 0), "test": (4, 8)}, cell=CELL, seed=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1] == (18, 18)
    lines = table.read_text().splitlines()
    assert lines[0] == "image_path,label,split,kind,mask_path"
    assert len(lines) == 19
    assert "images/train/normal_00000.png,0,train,normal," in lines
    assert "images/test/missing_00000.png,1,test,missing,masks/test/missing_00000.png" in lines
    records = find_records(tmp_path / "set")
    counts = Counter((record.split, record.label) for record in records)
    assert counts == {("train", 0): 6, ("test", 0): 4, ("test", 1): 8}
    loaded = load_images(records, 3 * CELL)
    number = loaded.paths.index(str(tmp_path / "set/images/test/swapped_00001.png"))
    tests = DigitAnatomy(cell=CELL, split="test", seed=2)
    tests.normal(4)
    grids = tests.anomalous(8)
    assert torch.equal(loaded.images[number], grids.images[1])
    mask = load_images(find_records(tmp_path / "set/masks", "flat"), 3 * CELL)
    number = mask.paths.index(str(tmp_path / "set/masks/test/swapped_00001.png"))
    assert torch.equal(mask.images[number] == 255, grids.masks[1])
    with pytest.raises(FileExistsError, match="exists already"):
        write_digit_anatomy(tmp_path / "set", {"train": (1, 0)}, cell=CELL)
    write_digit_anatomy(tmp_path / "set", {"train": (1, 0)}, cell=CELL, overwrite=True)
    assert len(find_records(tmp_path / "set")) == 1


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_mnist(folder: Path, name: str = "train", n: int = 100, level: int = 255) -> None:
    images = np.full((n, 6, 5), level, dtype=np.uint8)
    labels = np.arange(n, dtype=np.uint8) % 10
    (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
    (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


def test_idx_pairs_are_found(tmp_path: Path) -> None:
    write_mnist(tmp_path, "t10k", n=50, level=100)
    images, labels = load_mnist(tmp_path)
    assert images.shape == (50, 6, 5)
    assert labels.tolist() == list(range(10)) * 5
    write_mnist(tmp_path, "train")
    assert load_mnist(tmp_path)[0].shape == (100, 6, 5)  # train comes first
    assert load_mnist(tmp_path / "t10k-images-idx3-ubyte")[0].max() == 100
    assert DigitAnatomy(tmp_path, cell=8).normal(2, 0).images.shape == (2, 1, 24, 24)


def test_idx_errors(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    whole = idx(np.zeros((3, 4, 4), dtype=np.uint8))
    for data, reason in (
        (b"", "begins with b''"),
        (b"\x89PNG" + whole, "begins with"),
        (b"\0\0\x0d" + whole[3:], "begins with"),  # floats
        (whole[:-1], "promises 48 bytes"),
        (whole + b"\0", "holds more"),
        (whole[:9], "ends within its header of 3 sizes"),
        (gzip.compress(whole)[:-12], "cannot be read"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "cannot be read|promises"),
    ):
        path.write_bytes(data)
        with pytest.raises(DigitSourceError, match=reason):
            read_idx(path)
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_idx(path), np.zeros((3, 4, 4)))
    with pytest.raises(DigitSourceError, match="has no labels"):
        load_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    for values, reason in (([0, 0], r"\[n, h, w\] and \[n\]"), ([10, 10, 10], "label 10")):
        labels.write_bytes(idx(np.array(values, dtype=np.uint8)))
        with pytest.raises(DigitSourceError, match=reason):
            load_mnist(tmp_path)
    labels.write_bytes(idx(np.zeros(3, dtype=np.uint8)))
    with pytest.raises(DigitSourceError, match="digit 1, none is left"):
        DigitAnatomy(tmp_path, cell=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DigitSourceError, match="holds neither"):
        load_mnist(tmp_path / "empty")


def test_real_mnist(shared: Path) -> None:
    folder = shared / "data/mnist"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    images, labels = load_mnist(folder)
    assert images.shape == (10_000, 28, 28)
    assert labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    grids = DigitAnatomy(folder, split="test").anomalous(40, 0)
    assert grids.images.shape == (40, 1, 96, 96)
    unaffected = ~cells(grids.masks.byte())[:, :, 0, 0].bool()
    assert (cells(grids.images)[unaffected].amax((1, 2)) > 100).all()
