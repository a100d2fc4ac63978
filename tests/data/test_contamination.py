"""Unlabelled abnormal images among the training images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from squid_fast.data import ImageSet
from squid_fast.data.contamination import check_apart, contaminated
from tests.command_line import squid


def images(n: int, value: int, label: int = 0) -> ImageSet:
    pixels = torch.full((n, 1, 4, 4), value, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(n, dtype=torch.uint8)
    return ImageSet(pixels, torch.full((n,), label), [f"{value}/{i}" for i in range(n)])


@pytest.mark.parametrize(("rate", "count"), [(0.1, 10), (0.05, 5), (0.2, 22), (0.5, 90)])
def test_the_rate_is_the_share_of_the_mixed_set(rate: float, count: int) -> None:
    normal, others = images(90, 10), images(100, 200, 1)
    mixed, paths = contaminated(normal, others, rate, seed=3)
    assert len(paths) == count
    assert len(mixed) == 90 + count
    assert count / len(mixed) == pytest.approx(rate, abs=0.005)
    assert torch.equal(mixed.images[:90], normal.images)
    assert bool((mixed.images[90:, 0, 1, 1] == 200).all())
    assert len(set(paths)) == count
    assert mixed.paths[90:] == paths
    assert not mixed.labels.any()  # nobody has looked
    assert bool((others.labels == 1).all())


def test_the_draw_is_the_seeds() -> None:
    draws = [contaminated(images(90, 10), images(100, 200), 0.1, s)[1] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the rate is 1\.5; it must lie between 0 and 1"):
        contaminated(images(9, 1), images(9, 2), 1.5)
    with pytest.raises(ValueError, match=r"takes 90 images .* are 10 to mix .* most 0\.1 would"):
        contaminated(images(90, 1), images(10, 2), 0.5)
    contaminated(images(90, 1), images(10, 2), 0.1)
    (tmp_path / "a.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 of the images to mix in are validation or test images"):
        check_apart([tmp_path / "b.png", tmp_path / "link.png"], [tmp_path / "a.png"])
    check_apart([tmp_path / "b.png"], [tmp_path / "a.png"])


def test_the_verb_mixes_says_so_and_does_not_resume_with_another_mixture(tmp_path: Path) -> None:
    generator = torch.manual_seed(0)
    for folder, count in {"data/train/NORMAL": 27, "data/val/NORMAL": 20, "odd/B": 5}.items():
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 256, (48, 48), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / folder / f"{i}.png")
    command = [
        "train", "--preset", "small", "--data", tmp_path / "data", "--out", tmp_path / "run",
        "--epochs", 1, "--batch-size", 10, "--device", "cpu", "--contaminate", tmp_path / "odd",
    ]  # fmt: skip
    refused = squid(*command, check=False)
    assert refused.returncode == 1
    assert "give both" in refused.stderr
    squid(*command, "--contamination-rate", 0.1)
    about = json.loads((tmp_path / "run/config.json").read_text())["about"]
    assert about["training_images"] == 30
    assert about["contamination"].items() >= {"images": 3, "rate": 0.1}.items()
    for file in (tmp_path / "odd/B").iterdir():  # other images, as many
        Image.new("L", (48, 48), 9).save(file)
    other = squid(*command, "--contamination-rate", 0.1, "--resume", check=False)
    assert other.returncode == 1
    assert "images_sha256 was" in other.stderr
