"""Image sets hold what was read, in order, as bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from squid_fast.data import ImageReadError, ImageSet, Record, load_image, load_images

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def records(tmp_path: Path, levels: list[int]) -> list[Record]:
    made = []
    for number, level in enumerate(levels):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((6, 9), level, dtype=np.uint8)).save(path)
        made.append(Record(path, [0, 1, None][number % 3], None))
    return made


@pytest.mark.parametrize("workers", [None, 1, 4])
def test_order_labels_and_progress(tmp_path: Path, workers: int | None) -> None:
    levels = [int(level) for level in np.random.default_rng(0).integers(0, 256, 300)]
    seen: list[tuple[int, int]] = []
    loaded = load_images(
        records(tmp_path, levels), 4, workers, lambda done, total: seen.append((done, total))
    )
    assert len(loaded) == 300
    assert loaded.images.shape == (300, 1, 4, 4)
    assert loaded.images[:, 0, 1, 2].tolist() == levels
    assert loaded.labels.tolist() == [0, 1, -1] * 100
    assert loaded.paths[7] == str(tmp_path / "7.png")
    assert seen == [(256, 300), (300, 300)]


def test_bytes_are_rounded_from_the_floats(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 65536, (40, 30)).astype(np.uint16)
    Image.fromarray(noise).save(tmp_path / "a.png")
    stored = load_images([Record(tmp_path / "a.png", 0, None)], 16).images[0, 0].numpy()
    exact = load_image(tmp_path / "a.png", 16) * 255
    assert np.abs(stored - exact).max() <= 0.5 + 1e-4


def test_broken_files_are_told_at_the_end(tmp_path: Path) -> None:
    good = records(tmp_path, [10, 20, 30])
    broken = []
    for number in range(7):
        path = tmp_path / f"broken{number}.png"
        path.write_text("no image")
        broken.append(Record(path, 1, None))
    mixed = [good[0], *broken[:3], good[1], *broken[3:], good[2]]
    with pytest.raises(ImageReadError, match=r"^7 of 10 images could not be read: .*and 2 more$"):
        load_images(mixed, 4)
    kept = load_images(mixed, 4, skip_broken=True)
    assert kept.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert kept.labels.tolist() == [0, 1, -1]
    assert [path for path, _ in kept.broken] == [str(record.path) for record in broken]
    assert all("begins with b'no image'" in reason for _, reason in kept.broken)


def test_nothing_to_load_and_bad_arguments() -> None:
    empty = load_images([], 8)
    assert len(empty) == 0
    assert empty.batch([]).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match="size is 0"):
        load_images([], 0)
    with pytest.raises(ValueError, match="workers is 0"):
        load_images([], 8, workers=0)


def image_set() -> ImageSet:
    images = torch.arange(5 * 4, dtype=torch.uint8).mul(10).reshape(5, 1, 2, 2)
    return ImageSet(images, torch.tensor([0, 1, 0, 1, -1]), list("abcde"))


def test_batch_and_subset() -> None:
    whole = image_set()
    expected = whole.images[[3, 1]].double() / 255
    for indices in ([3, 1], torch.tensor([3, 1])):
        batch = whole.batch(indices)
        assert batch.dtype == torch.float32
        torch.testing.assert_close(batch.double(), expected, atol=1e-7, rtol=0)
    assert torch.equal(whole.batch(slice(1, 3)), whole.batch([1, 2]))
    assert whole.images[0, 0, 0, 1] == 10  # a batch is a copy
    for chosen in (whole.labels == 1, [1, 3], [False, True, False, True, False]):
        part = whole.subset(chosen)
        assert part.paths == ["b", "d"]
        assert part.labels.tolist() == [1, 1]
        assert torch.equal(part.images, whole.images[[1, 3]])
    assert len(whole.subset([])) == 0
    assert whole.normal.paths == ["a", "c"]
    assert [len(part) for part in whole.batches(2)] == [2, 2, 1]
    assert torch.equal(torch.cat([*whole.batches(2)]), whole.batch(slice(None)))
    assert whole.to("cpu").paths == whole.paths
    with pytest.raises(ValueError, match=r"shape \(2,\), not \[5\]"):
        whole.subset(torch.tensor([True, False]))


@pytest.mark.parametrize(
    ("count", "paths"), [(1, "a"), (2, "ace"), (3, "abcde"), (5, "abcde"), (9, "abcde")]
)
def test_a_subsample_is_spread_over_the_set(count: int, paths: str) -> None:
    assert image_set().subsample(count).paths == list(paths)


@pytest.mark.parametrize(
    ("images", "labels", "paths", "reason"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), ["a", "b"], "images is torch.float32"),
        (torch.zeros(2, 1, 4, 5).byte(), torch.zeros(2).long(), ["a", "b"], "images is"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3).long(), ["a", "b"], "labels is"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2).long(), ["a"], "1 paths for 2 images"),
    ],
)
def test_sets_that_do_not_fit_together(
    images: torch.Tensor, labels: torch.Tensor, paths: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        ImageSet(images, labels, paths)
