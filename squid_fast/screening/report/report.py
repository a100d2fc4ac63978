"""The report of a screening run: one HTML file that needs no network and no scripts."""

from __future__ import annotations

import base64
import importlib.resources
import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..._version import __version__
from ...data.listing import counted
from ...utils.atomic import replacing
from ...utils.extras import require
from ...utils.outputs import check_distinct
from ...utils.text import utf8_text
from ..pipeline import ScorerLike, ScreenRow
from ..reading.files import PathInput, as_paths
from ..reading.pool import read_ahead
from .histogram import draw_histogram
from .summary import Summary, summarise

_RESCORE_BATCH = 16
_MAX_SIDE = 320  # pixels; larger images are shown at this size
_MAX_TEXT = 400  # characters of a path or an error
_HEAT_ANCHORS = (  # colours from black to pale yellow, evenly spaced and ever brighter
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51),
    (249, 140, 10), (249, 201, 50), (252, 255, 164),
)  # fmt: skip


def write_report(
    path: PathInput,
    scorer: ScorerLike,
    rows: Summary | Iterable[ScreenRow],
    *,
    title: str = "Radiograph screening report",
    inputs: PathInput | Iterable[PathInput] = (),
    model_name: str | None = None,
    results: PathInput | None = None,
    reference_z: Sequence[float] | np.ndarray | None = None,
    created: datetime | None = None,
) -> None:
    """Write the report of a run to ``path``, replacing a file there only when it is complete.

    The images shown, ``most_anomalous`` of the summary, are read and scored again for their
    reconstructions; one that can no longer be read is shown by its name. Other flagged images and
    files without a score are listed, as many as the summary holds, so that the page stays below
    20 MB whatever was screened.

    Args:
        scorer: the scorer of the run.
        rows: a ``Summary`` of the run, or its rows, which are then consumed.
        inputs: what was screened, as the user named it.
        results: path of the table with all rows.
        reference_z: z-scores of normal validation images, of any shape, drawn beside the run's.
        created: time of the report, by default now.

    Raises:
        ImportError: jinja2 or Pillow is missing.
        ValueError: ``reference_z`` holds a value that is not finite, or ``path`` is ``results``.
        OSError: the file cannot be written.

    >>> from types import SimpleNamespace
    >>> run = {"score_name": "l1", "threshold": 1.64, "false_positive_rate": 0.05}
    >>> scorer = SimpleNamespace(image_size=128, **run)
    >>> write_report("report.html", scorer, [], title="Night shift")
    >>> "<h1>Night shift</h1>" in Path("report.html").read_text(encoding="utf-8")
    True
    """
    jinja2 = require("jinja2", "screen")
    check_distinct({"path": path}, {"results": [] if results is None else [results]})
    reference = np.asarray([] if reference_z is None else reference_z, dtype=np.float64).ravel()
    if not np.isfinite(reference).all():
        raise ValueError("reference_z must be finite")
    summary = rows if isinstance(rows, Summary) else summarise(rows)
    threshold = float(scorer.threshold)
    histogram = draw_histogram(summary.z_scores, threshold, reference) if summary.scored else None
    findings, heat_scale = _findings(scorer, summary.most_anomalous, reference)
    template = importlib.resources.files("squid_fast.screening.report").joinpath("report.html.j2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(template.read_text("utf-8")).render(
        title=_shown(title),
        created=(created or datetime.now()).astimezone().strftime("%d %B %Y, %H:%M %Z").lstrip("0"),
        inputs=[_shown(path) for path in as_paths(inputs)],
        model_name=None if model_name is None else _shown(model_name),
        score_name=_shown(scorer.score_name),
        image_size=scorer.image_size,
        threshold=threshold,
        false_positive_rate=float(scorer.false_positive_rate),
        summary=summary,
        histogram=histogram,
        reference_count=reference.size,
        findings=findings,
        heat_scale=heat_scale,
        heat_colours=", ".join("rgb({}, {}, {})".format(*colour) for colour in _HEAT_ANCHORS),
        left_out=counted(summary.left_out),
        flagged=[(_shown(row.path), _number(row.z_score or 0.0)) for row in summary.flagged_rows],
        error_kinds=[
            (_shown(kind.reason), kind.count, [_shown(row.path) for row in kind.rows])
            for kind in summary.error_kinds
        ],
        results=None if results is None else _shown(os.fspath(results)),
        version=__version__,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(html.encode("utf-8"))


def _findings(
    scorer: ScorerLike, rows: list[ScreenRow], reference: np.ndarray
) -> tuple[list[dict[str, Any]], float]:
    """The images of the gallery, as data URLs or None, and the greatest difference of heat maps."""
    pictures = list(_pictures(scorer, rows))
    peaks = [np.quantile(p.difference, 0.995) for p in pictures if p.difference is not None]
    scale = min(1.0, max(0.05, math.ceil(max(peaks, default=0.0) * 20) / 20))
    findings = []
    for rank, (row, picture) in enumerate(zip(rows, pictures, strict=True), start=1):
        assert row.z_score is not None
        assert row.anomaly_score is not None
        finding = {
            "rank": rank,
            "name": _shown(os.path.basename(row.path) or row.path),
            "path": _shown(row.path),
            "flag": row.flag,
            "z_score": _number(row.z_score),
            "meaning": _meaning(row.z_score, reference),
            "anomaly_score": _anomaly_text(row.anomaly_score),
            "image": _grey_png(picture.image),
            "reconstruction": _grey_png(picture.reconstruction),
            "difference": _heat_png(picture.difference, scale),
            "problem": None if picture.problem is None else _shown(picture.problem),
        }
        findings.append(finding)
    return findings, scale


@dataclass(frozen=True)
class _Picture:
    """float32 arrays [H, W]: image and reconstruction in [0, 1], their absolute difference."""

    image: np.ndarray | None = None
    reconstruction: np.ndarray | None = None
    difference: np.ndarray | None = None
    problem: str | None = None


def _pictures(scorer: ScorerLike, rows: list[ScreenRow]) -> Iterator[_Picture]:
    with closing(read_ahead([row.path for row in rows], scorer.image_size)) as decoded:
        while batch := list(itertools.islice(decoded, _RESCORE_BATCH)):
            images = [item.image for item in batch if item.image is not None]
            others: Iterator[np.ndarray | None] = itertools.repeat(None)
            if images:
                stacked = torch.from_numpy(np.stack(images))[:, None]
                scored = scorer.score(stacked, reconstruction=True).reconstruction
                if scored is not None:
                    others = iter(np.nan_to_num(scored.float().numpy()[:, 0]).clip(0, 1))
            for item in batch:
                if item.image is None:
                    yield _Picture(problem=item.error)
                    continue
                image, other = item.image.astype(np.float32) / 255, next(others)
                yield _Picture(image, other, None if other is None else np.abs(image - other))


def _meaning(z: float, reference: np.ndarray) -> str:
    if not reference.size:
        side = "less" if z >= 0 else "more"
        return f"{abs(z):.1f} standard deviations {side} normal than the average training image"
    below = int((reference < z).sum())
    if below == reference.size:
        return f"above all {below:,} normal validation images"
    share = math.floor(below / reference.size * 1000) / 10
    return f"above {share:.1f} % of {reference.size:,} normal validation images"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _anomaly_text(score: float) -> str:
    if score > 0.999:
        return "above 0.999"
    return "below 0.001" if score < 0.001 else f"{score:.3f}"


def _grey_png(values: np.ndarray | None) -> str | None:
    return None if values is None else _png(values.clip(0, 1) * 255)


def _heat_png(difference: np.ndarray | None, scale: float) -> str | None:
    if difference is None:
        return None
    anchors = np.array(_HEAT_ANCHORS, dtype=np.float64)
    position = (difference / scale).clip(0, 1) * (len(anchors) - 1)
    index = np.minimum(position.astype(np.int64), len(anchors) - 2)
    part = (position - index)[..., None]
    return _png(anchors[index] * (1 - part) + anchors[index + 1] * part)


def _png(pixels: np.ndarray) -> str:
    """Encode grey values [H, W] or colours [H, W, 3] from 0 to 255 as a data URL."""
    picture = require("PIL.Image", "screen").fromarray(pixels.round().astype(np.uint8))
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _shown(text: str) -> str:
    """Text for the page: shortened if it is long, with invisible characters spelled out."""
    text = utf8_text(text)
    if len(text) > _MAX_TEXT:
        text = f"{text[: _MAX_TEXT // 2]} … {text[-_MAX_TEXT // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
