"""The report: complete in itself, escaped, bounded, and right in what it says."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from squid_fast.data import ImageReadError
from squid_fast.screening import ScreenRow, screen, summarise, write_report
from squid_fast.screening.report.histogram import Histogram, draw_histogram
from tests.factories import MeanScorer

pytest.importorskip("jinja2")
pil_image = pytest.importorskip("PIL.Image")

SIZE = 8
CREATED = datetime(2026, 3, 5, 14, 7, tzinfo=timezone.utc)


class WithoutReconstruction(MeanScorer):
    def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
        return super().score(images, reconstruction=False)


def save(folder: Path, values: dict[str, float]) -> list[str]:
    for name, value in values.items():
        np.save(folder / f"{name}.npy", np.full((SIZE, SIZE), value, dtype=np.float32))
    return [str(folder / f"{name}.npy") for name in values]


def fake_row(index: int, z: float) -> ScreenRow:
    return ScreenRow(f"missing/{index:06d}.png", z, z, 0.5, z > 5.0, 5.0, None)


class Page(HTMLParser):
    """Text, tags and pictures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.in_cell = False
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")
            self.in_cell = True

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.in_cell:
            self.cells[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def rows(self) -> list[list[str]]:
        """Of all tables, with their heads."""
        return [[" ".join(cell.split()) for cell in row] for row in self.cells]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self) -> list[np.ndarray]:
        urls = [attributes["src"] or "" for attributes in self.all("img")]
        data = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
        return [np.asarray(pil_image.open(io.BytesIO(item))) for item in data]


def test_page_says_what_was_found(tmp_path: Path) -> None:
    paths = save(tmp_path, {"low": 0.2, "high": 0.8, "mid": 0.4, "top": 1.0})
    inputs = [*paths, str(tmp_path / "missing.png")]
    out = tmp_path / "new" / "report.html"
    write_report(out, MeanScorer(), screen(MeanScorer(), inputs), title="Ward 3", inputs=inputs,
                 model_name="zhanglab", results="results.csv", created=CREATED)  # fmt: skip
    assert os.listdir(out.parent) == ["report.html"]
    page = Page(out)
    local = CREATED.astimezone().strftime("%d %B %Y, %H:%M").lstrip("0")
    for words in (
        "Ward 3",
        local,
        "zhanglab",
        "results.csv",
        "mean, on images of 8 × 8 pixels",
        "5 files screened",
        "2 flagged (50.0 %)",
        "2 not flagged",
        "1 could not be scored",
        "flagged when its z-score is above 5.00",
        "so that 5.0 % of them are flagged",
        "If all 4 scored images were normal and of the same kind, about 0 flags",
        "not a medical device",
        "not a probability of disease",
    ):
        assert words in page.text, words
    order = [page.text.index(f"{rank} {name}.npy") for rank, name in enumerate(
        ("top", "high", "mid", "low"), start=1)]  # fmt: skip
    assert order == sorted(order)
    assert "z = 10.00 , 10.0 standard deviations less normal than the average" in page.text
    assert "Anomaly score above 0.999." in page.text
    assert "Anomaly score 0.881." in page.text  # sigmoid(2)
    assert "1 file, by what was wrong with it." in page.text
    assert f"1 the file does not exist; give the path of an image file {tmp_path}/missing.png" in (
        page.text
    )


def test_pictures_are_image_reconstruction_and_difference(tmp_path: Path) -> None:
    paths = save(tmp_path, {"half": 0.4, "full": 0.8})
    write_report(tmp_path / "r.html", MeanScorer(), screen(MeanScorer(), paths))
    page = Page(tmp_path / "r.html")
    pictures = page.pictures()
    shapes = [picture.shape for picture in pictures]
    assert shapes == [(SIZE, SIZE), (SIZE, SIZE), (SIZE, SIZE, 3)] * 2
    assert [int(picture.flat[0]) for picture in pictures[0:2]] == [204, 102]  # full, and half of it
    assert [int(picture.flat[0]) for picture in pictures[3:5]] == [102, 51]
    assert "0.40 and more" in page.text  # the greatest difference sets the scale for all
    assert pictures[2][0, 0].tolist() == [252, 255, 164]  # 0.4: the last colour
    assert pictures[5][0, 0].tolist() == [186, 54, 85]  # 0.2: the middle colour
    alts = [attributes["alt"] for attributes in page.all("img")]
    assert alts[:3] == ["Image of full.npy", "Reconstruction of full.npy", "Difference of full.npy"]


def test_only_the_top_k_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    paths = save(tmp_path, {f"{i:02d}": (i + 0.5) / 20.5 for i in range(20)})
    summary = summarise(screen(MeanScorer(), paths, batch_size=3), top_k=3)
    write_report(tmp_path / "r.html", MeanScorer(), summary)
    page = Page(tmp_path / "r.html")
    shown = re.findall(r"\d (\d\d\.npy) flagged", page.text)
    assert shown == ["19.npy", "18.npy", "17.npy"]
    assert "The 3 images of greatest z-score among 20" in page.text
    assert len(page.pictures()) == 9
    assert "All 10, the greatest z-score first." in page.text  # 10 to 19 exceed 0.5
    listed = [(rank, path[-6:]) for rank, _, path in page.rows()[1:]]
    assert listed == [(str(rank), f"{20 - rank}.npy") for rank in range(1, 11)]


def test_more_findings_than_a_batch(tmp_path: Path) -> None:
    paths = save(tmp_path, {f"{i:02d}": i / 40 for i in range(40)})
    summary = summarise(screen(MeanScorer(), paths), top_k=40)
    (tmp_path / "20.npy").unlink()
    write_report(tmp_path / "r.html", MeanScorer(), summary)
    page = Page(tmp_path / "r.html")
    greys = [int(picture.flat[0]) for picture in page.pictures()[::3]]
    assert greys == [int(i / 40 * 255 + 0.5) for i in range(39, -1, -1) if i != 20]
    assert "could not be read again for this report" in page.text


def test_scorer_without_reconstructions(tmp_path: Path) -> None:
    paths = save(tmp_path, {"a": 0.5})
    scorer = WithoutReconstruction()
    write_report(tmp_path / "r.html", scorer, screen(scorer, paths))
    page = Page(tmp_path / "r.html")
    assert len(page.pictures()) == 1
    assert page.text.count("not available") == 2


EVIL = "<script>alert('x')</script>&\"><img src=x onerror=y>"


@pytest.mark.parametrize("name", ["reconstruction_error", "patch_error", "discriminator_instance"])
def test_whether_the_difference_is_what_the_score_measures(tmp_path: Path, name: str) -> None:
    scorer = MeanScorer()
    scorer.score_name = name
    write_report(tmp_path / "r.html", scorer, screen(scorer, save(tmp_path, {"a": 0.5})))
    said = "The score is not computed from it" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert said == (name == "discriminator_instance")


def test_everything_foreign_is_escaped(tmp_path: Path) -> None:
    scorer = MeanScorer()
    scorer.score_name = EVIL
    rows = [
        ScreenRow(f"{EVIL}.png", 1.0, 9.0, 0.9, True, 5.0, None),
        ScreenRow(f"bad {EVIL}", None, None, None, None, 5.0, f"reason {EVIL}"),
    ]
    foreign = dict.fromkeys(("title", "inputs", "model_name", "results"), EVIL)
    write_report(tmp_path / "r.html", scorer, rows, **foreign)
    page = Page(tmp_path / "r.html")
    assert page.all("script") == []
    assert page.all("img") == []
    assert "<script" not in page.source
    assert page.text.count(EVIL) >= 8  # and it reads as it is spelled


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    paths = save(tmp_path, {"a": 0.5, "b": 0.9})
    write_report(tmp_path / "r.html", MeanScorer(), screen(MeanScorer(), paths), reference_z=[1, 2])
    page = Page(tmp_path / "r.html")
    assert "://" not in page.source
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    for _, attributes in page.tags:
        source = attributes.get("src")
        assert source is None or source.startswith("data:image/png;base64,")
        assert not any(name.startswith("on") or name == "href" for name in attributes)


def test_undecodable_and_invisible_names_can_be_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\x1b[31m\xe2\x80\xae.png")  # escape code, right-to-left override
    rows = [
        ScreenRow(name, None, None, None, None, 5.0, f"{name} is bad"),
        ScreenRow(name, 1.0, 9.0, 0.9, True, 5.0, None),
    ]
    write_report(tmp_path / "r.html", MeanScorer(), rows, inputs=[name])
    page = Page(tmp_path / "r.html")
    assert page.text.count("caf\\xe9\\x1b[31m\\u202e.png") >= 4


def test_100_000_rows_with_the_flagged_and_the_kinds_of_errors(tmp_path: Path) -> None:
    def rows() -> Iterator[ScreenRow]:
        for i in range(100_000):
            path = f"missing/{i:06d}.png"
            if i % 20 == 1:
                reason = "is cut off" if i in (41, 61) else "is empty ({size} bytes)"
                error = ImageReadError(f"{{path}} {reason}", path=path, size=i % 7)
                yield ScreenRow(path, None, None, None, None, 5.0, str(error), error.kind)
            else:
                yield fake_row(i, 6.0 + i / 1e5 if i % 20 == 0 else -1.0)

    write_report(tmp_path / "r.html", MeanScorer(), rows(), results="all.csv")
    assert (tmp_path / "r.html").stat().st_size < 500_000
    page = Page(tmp_path / "r.html")
    assert "100,000 files screened 5,000 flagged (5.3 %) 90,000 not flagged" in page.text
    assert "The 1,000 of greatest z-score among 5,000 flagged images. All" in page.text
    assert "in the table of results, all.csv" in page.text
    found = page.rows()
    assert found[0] == ["Rank", "z-score", "File"]
    assert found[1] == ["1", "7.00", "missing/099980.png"]
    assert found[1000] == ["1000", "6.80", "missing/080000.png"]
    assert found[1001] == ["Files", "Reason"]
    assert [row[0] for row in found[1002:]] == ["4,998", "2"]
    assert found[1002][1].startswith(
        "the file is empty (… bytes) missing/000001.png and 4,997 others, the first 100 here"
    )
    assert found[1003][1] == "the file is cut off missing/000041.png missing/000061.png"
    # All of them in one box that scrolls, and in one that is folded besides.
    assert [a["class"] for _, a in page.tags if a.get("class") == "scroll"] == ["scroll"] * 2
    assert [a for a in page.all("details") if "open" in a] == []


def test_the_largest_page_is_below_20_mb(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        np.save(tmp_path / f"{i}.npy", rng.random((512, 512), dtype=np.float32))
    long = "&/" * 1000

    def rows() -> Iterator[ScreenRow]:
        for i in range(12):
            yield ScreenRow(str(tmp_path / f"{i}.npy"), 9.0, 9.0, 0.9, True, 5.0, None)
        for i in range(6_000):
            kind = "".join(chr(97 + int(digit)) for digit in str(i % 60))
            path = f"{long}{i}"
            yield ScreenRow(path, None, None, None, None, 5.0, f"{path} is {kind} " + "<" * 2000)
            yield ScreenRow(path, 8.0, 8.0, 0.9, True, 5.0, None)

    write_report(tmp_path / "r.html", MeanScorer(512), rows())
    assert 5_000_000 < (tmp_path / "r.html").stat().st_size < 20_000_000
    page = Page(tmp_path / "r.html")
    assert len(page.pictures()) == 36
    found = page.rows()
    assert len(found) == 1 + 1000 + 1 + 51
    assert found[1002][1].startswith("other reasons")
    assert found[1002][0] == "1,000"


def test_large_images_are_reduced(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.random((1024, 1024), dtype=np.float32))
    write_report(
        tmp_path / "r.html", MeanScorer(1024), screen(MeanScorer(1024), tmp_path / "a.npy")
    )
    assert [p.shape[:2] for p in Page(tmp_path / "r.html").pictures()] == [(320, 320)] * 3


@pytest.mark.parametrize("rows", [[], [ScreenRow("a", None, None, None, None, 5.0, "bad")]])
def test_run_without_scores(tmp_path: Path, rows: list[ScreenRow]) -> None:
    write_report(tmp_path / "r.html", MeanScorer(), rows)
    page = Page(tmp_path / "r.html")
    assert "No image was scored." in page.text
    assert page.all("svg") == []
    assert page.all("img") == []
    assert len(page.all("table")) == len(rows)


def test_place_among_reference(tmp_path: Path) -> None:
    rows = [fake_row(i, z) for i, z in enumerate((3.0, 2.0, -1.0))]
    write_report(
        tmp_path / "r.html", MeanScorer(), rows, reference_z=np.arange(-1.0, 2.0).reshape(3, 1)
    )
    text = Page(tmp_path / "r.html").text
    assert "z = 3.00 , above all 3 normal validation images" in text
    assert "z = −1.00 , above 0.0 % of 3 normal validation images" in text
    with pytest.raises(ValueError, match="reference_z must be finite"):
        write_report(tmp_path / "r.html", MeanScorer(), rows, reference_z=[float("nan")])


def test_failure_leaves_the_old_report(tmp_path: Path) -> None:
    class Fails(MeanScorer):
        def score(self, images: torch.Tensor, reconstruction: bool = False) -> SimpleNamespace:
            raise RuntimeError("no memory")

    summary = summarise(screen(MeanScorer(), save(tmp_path, {"a": 0.5})))
    (tmp_path / "r.html").write_text("old")
    with pytest.raises(RuntimeError, match="no memory"):
        write_report(tmp_path / "r.html", Fails(), summary)
    assert (tmp_path / "r.html").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "r.html"]


# The histogram


def bar_counts(histogram: Histogram) -> list[tuple[int, bool]]:
    return [(int(bar.label.split(": ")[1].replace(",", "")), bar.flagged) for bar in histogram.bars]


def test_bars_count_every_score_and_divide_at_the_threshold() -> None:
    rng = np.random.default_rng(2)
    z = np.concatenate([rng.normal(size=5000), [1.5] * 100, [4000.0, -500.0]]).astype(np.float32)
    histogram = draw_histogram(z, 1.5, np.empty(0))
    counts = bar_counts(histogram)
    assert sum(count for count, _ in counts) == z.size
    assert sum(count for count, flagged in counts if flagged) == (z > 1.5).sum()
    assert histogram.outside == 2
    assert histogram.threshold is not None
    assert 0 < histogram.threshold < 100
    edges = [bar.left for bar in histogram.bars] + [bar.left + bar.width for bar in histogram.bars]
    assert min(abs(edge - histogram.threshold) for edge in edges) < 1e-9
    assert max(bar.height for bar in histogram.bars) == pytest.approx(100 / 1.06)
    assert min(bar.height for bar in histogram.bars) >= 0.8


@pytest.mark.parametrize("z", [[0.3], [2.0, 2.0], [1e-7, 2e-7], [-1e6, 1e6], [5.0]])
@pytest.mark.parametrize("threshold", [2.0, -40.0, float("inf")])
def test_odd_distributions(z: list[float], threshold: float) -> None:
    values = np.array(z, dtype=np.float32)
    histogram = draw_histogram(values, threshold, np.empty(0))
    counts = bar_counts(histogram)
    assert sum(count for count, _ in counts) == len(z)
    assert sum(count for count, flagged in counts if flagged) == (values > threshold).sum()
    assert all(bar.left >= 0 and bar.left + bar.width <= 100 + 1e-9 for bar in histogram.bars)
    assert all(-1e-9 <= x <= 100 + 1e-9 for x, _ in histogram.x_ticks)
    assert 2 <= len(histogram.x_ticks) <= 12
    assert (histogram.threshold is None) == np.isinf(threshold)


def test_reference_outline_has_the_total_of_the_run() -> None:
    z = np.linspace(-2, 2, 1000).astype(np.float32)
    histogram = draw_histogram(z, 1.0, np.linspace(-2, 2, 50))
    points = [tuple(map(float, p.split(","))) for p in histogram.reference.split()]
    outline = sum(100 - y for _, y in points[::2])
    bars = sum(bar.height for bar in histogram.bars)
    assert outline == pytest.approx(bars, rel=0.01)
