"""``squid-fast bench``: that it times what it says, with figures that fit together."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from squid_fast import PRESETS, save_bundle
from squid_fast.experiments import benchmark
from squid_fast.experiments.benchmark import Benchmark, compare, figures, random_bundle
from squid_fast.experiments.published import published_way
from squid_fast.inference.bundle import Bundle
from tests.command_line import squid
from tests.processor import HAS_BF16

pytest.importorskip("typer")
pil_image = pytest.importorskip("PIL.Image")

CPU = torch.device("cpu")
QUICK = ("--rounds", 1, "--seconds", 0, "--batch-size", 2, "--threads", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return random_bundle(PRESETS["small"])


def test_contenders_take_turns_and_the_first_call_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, calls, steps = 0.0, [], []
    times = {"a": iter([100.0, 4.0, 8.0, 6.0]), "b": iter([50.0, 1.0, 4.0, 1.0])}

    def call(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += next(times[name])

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)
    contenders = {"a": (2, lambda: call("a")), "b": (1, lambda: call("b"))}
    seconds = compare(contenders, 3, lambda *step: steps.append(step))
    assert calls == ["a", "b"] * 4
    assert steps == [(done, 8) for done in range(1, 9)]
    assert seconds == {"a": [2.0, 4.0, 3.0], "b": [1.0, 4.0, 1.0]}
    # Of b: median 1 s, and round by round 2, 1 and 3 times as fast.
    assert figures(contenders, seconds) == {
        "a": {"images": 2, "images_per_second": 0.33, "milliseconds": 3000.0, "ratio": 1.0},
        "b": {"images": 1, "images_per_second": 1.0, "milliseconds": 1000.0, "ratio": 2.0},
    }


def test_random_weights_tell_images_apart(bundle: Bundle) -> None:
    images = benchmark._images(16, 48)
    assert 0 <= images.min() < 0.1 < 0.9 < images.max() <= 1
    scores = published_way(bundle, CPU)(images)
    assert scores.unique().numel() == 16
    assert scores.std() > 1e-3
    ours = Benchmark(bundle, CPU).scorer("float32").score(images).raw
    torch.testing.assert_close(ours, scores, rtol=1e-3, atol=1e-4)


def test_ways_that_disagree_are_not_timed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy.deepcopy(bundle.discriminator)
    with torch.no_grad():
        other.regressor.weight.mul_(1.1)
    published = published_way(Bundle(bundle.model, other), CPU)
    monkeypatch.setattr(benchmark, "published_way", lambda *_: published)
    monkeypatch.setattr(benchmark, "compare", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=r"off by 0\.\d+ of their standard deviation"):
        Benchmark(bundle, CPU, batch=2).run(["evaluation"])


def check(rows: dict[str, dict[str, float]]) -> None:
    """What holds of one round, where a median is the only value there is."""
    first = next(iter(rows.values()))
    for row in rows.values():
        rate = row["images_per_second"]
        assert rate == pytest.approx(1e3 / row["milliseconds"], rel=0.01, abs=0.01)
        ratio = first["milliseconds"] / row["milliseconds"]
        assert row["ratio"] == pytest.approx(ratio, rel=0.01, abs=0.001)


def test_the_figures_of_a_preset(tmp_path: Path) -> None:
    out, options = tmp_path / "bench.json", ("--preset", "small", "--precision", "float32")
    found = json.loads(squid("bench", *options, *QUICK, "--json", "--out", out).stdout)
    assert found == json.loads(out.read_text())
    assert {"device", "squid_fast", "torch", "triton", "python", "date"} <= found.keys()
    told = ("model", "data", "threads", "precision", "image_size", "batch", "rounds")
    assert [found[key] for key in told] == ["small", None, 1, "float32", 48, 2, 1]
    model, files = found["evaluation"], found["screening"]
    expected = {"published way, batch of 1": 1, "published way, batch of 2": 2}
    expected |= {f"squid_fast.Scorer, float32, batch of {batch}": batch for batch in (2, 8)}
    if HAS_BF16:  # for comparison, where the machine has it
        expected["squid_fast.Scorer, bf16, batch of 2"] = 2
    assert {name: row["images"] for name, row in model.items()} == expected
    check(model)
    equal = model["published way, batch of 2"]["milliseconds"]
    ours = model["squid_fast.Scorer, float32, batch of 2"]
    assert ours["ratio_at_equal_batch"] == pytest.approx(equal / ours["milliseconds"], rel=0.01)
    assert "ratio_at_equal_batch" not in model["squid_fast.Scorer, float32, batch of 8"]
    assert [row["images"] for row in files.values()] == [2, 8, 8]
    ways = ["published way, file by file", "squid_fast.Scorer, from memory"]
    assert list(files) == [*ways, "squid_fast.screen, 8 files"]
    check(files)
    alone, whole = list(files.values())[1:]
    share = alone["milliseconds"] / whole["milliseconds"]
    assert whole["share_of_scorer"] == pytest.approx(share, rel=0.01, abs=0.001)


def test_a_bundle_and_files_of_ones_own(bundle: Bundle, tmp_path: Path) -> None:
    save_bundle(bundle, tmp_path / "run")
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        pil_image.new("L", (50, 60), 40 * index).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "packed.arrow").write_bytes(b"")
    out = tmp_path / "b.json"
    done = squid("bench", "--bundle", tmp_path / "run", "--data", folder, *QUICK, "--out", out)
    said, found = " ".join(done.stdout.split()), json.loads(out.read_text())
    assert "times as fast as the published way" in said
    assert f"as {found['waiting']} has it" in said
    assert (found["model"], found["data"]) == (str(tmp_path / "run"), str(folder))
    row = found["screening"]["squid_fast.screen, 5 files"]
    shown = next(line for line in done.stdout.splitlines() if "screen, 5 files" in line)
    assert f"{row['images_per_second']:,.1f}" in shown
    assert f"{row['ratio']:.2f}" in shown
    assert f"{row['share_of_scorer']:.0%} of its" in said


def test_mistakes_end_in_one_sentence(tmp_path: Path) -> None:
    cases: dict[tuple[str | Path, ...], str] = {
        ("--bundle", tmp_path): "config.json is missing",
        ("--preset", "small", "--out", tmp_path / "no" / "b.json"): "there is no folder",
    }
    for arguments, sentence in cases.items():
        done = squid("bench", *arguments, *QUICK, check=False)
        assert done.returncode == 1, arguments
        assert sentence in done.stderr, arguments
        assert "Traceback" not in done.stderr, arguments


def test_files_that_cannot_be_read(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no image files; name a folder that does"):
        Benchmark(bundle, CPU, data=tmp_path)
    (tmp_path / "text.png").write_text("not an image")
    wrong = Benchmark(bundle, CPU, batch=2, seconds=0, data=tmp_path)
    with pytest.raises(ValueError, match=r"no image can be read: .*text.png is not an image"):
        wrong.run(["screening"])
