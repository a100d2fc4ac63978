"""The main job on data that needs no download: synthesise, train, evaluate, screen, report."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ._extras import require
from .data import KINDS, DigitAnatomy, DigitGrids
from .evaluation import image_auroc
from .inference import Scorer
from .modules import SQUID
from .presets import preset
from .scores import PAPER_SCORE, SCORES
from .screening import screen_to_table, write_report
from .training import Progress, train_bundle
from .training.loop import seconds_per_step

PRESET = "small"
SCORE = "patch_error"
EPOCHS = 10
HELD_OUT_GRIDS = 400  # normal ones for thresholds, normal ones for the test, and of each kind


@dataclass(frozen=True)
class DemoResult:
    """AUROCs of every score for every kind of anomaly, on grids of unseen handwriting."""

    aurocs: dict[str, dict[str, float]]
    score: str  # the one that the bundle screens by
    trained_grids: int
    training_seconds: float
    screened: dict[str, Any]
    report: str
    table: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"paper_score": PAPER_SCORE}

    def summary(self) -> str:
        weakest = min(self.aurocs[self.score].values())
        return (
            f"{self.score}: {SCORES[self.score][1]}; at least {weakest:.2f} for every kind.\n"
            f"{PAPER_SCORE}: {SCORES[PAPER_SCORE][1]}.\n"
            f"trained on {self.trained_grids} grids in {self.training_seconds:.0f} s\n"
            f"results: {self.table}\n"
            f"report:  {self.report}"
        )


def run_demo(
    out: Path,
    minutes: float,
    *,
    source: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    say: Callable[[str], None] = print,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> DemoResult | None:
    """Run the demo into ``out``; None if it was stopped while training.

    Args:
        minutes: of training, about: a few steps are timed first and as many grids drawn as fit,
            so that a fast machine learns from more of them and a slow one still ends in time.
        source: MNIST IDX files; scikit-learn's bundled digits unless given.
        seed: of data, weights and training.

    Raises:
        CheckpointError: ``out`` already holds a run.
    """
    chosen = preset(PRESET)
    cell = chosen.image_size // 3
    recipe = replace(chosen.recipe, epochs=EPOCHS, t_max=EPOCHS, validate_every=EPOCHS)
    drawer = DigitAnatomy(source, cell, "train", seed)
    say("timing a few steps")
    sample = drawer.normal(recipe.batch_size, seed).as_image_set()
    per_step = seconds_per_step(SQUID(**chosen.model), sample, recipe, device)
    per_epoch = recipe.batch_size * max(1, int(60 * minutes / per_step / EPOCHS))
    say(
        f"training for about {minutes:g} minutes: {EPOCHS} times {per_epoch} normal grids of "
        f"{chosen.image_size} x {chosen.image_size} pixels"
    )
    validation = DigitAnatomy(source, cell, "val", seed).normal(HELD_OUT_GRIDS, seed + 1)
    started = time.perf_counter()
    result = train_bundle(
        chosen,
        drawer.normal(per_epoch, seed).as_image_set(),
        out,
        recipe=recipe,
        validation_set=validation.as_image_set(),
        score=SCORE,
        seed=seed,
        device=device,
        report=report,
        should_stop=should_stop,
    )
    if not result.finished:
        return None
    seconds = time.perf_counter() - started

    say("evaluating and screening unseen grids")
    scorer = Scorer.load(out, device=device)
    unseen = DigitAnatomy(source, cell, "test", seed)
    normal = unseen.normal(HELD_OUT_GRIDS, seed + 2)
    anomalous = unseen.anomalous(HELD_OUT_GRIDS * len(KINDS), seed + 3)
    screened, table, page = _screen(scorer, _write_pngs(out / "grids", normal, anomalous), out)
    demo = DemoResult(
        auroc_by_kind(scorer, normal, anomalous),
        score=SCORE,
        trained_grids=EPOCHS * per_epoch,
        training_seconds=round(seconds, 1),
        screened=screened,
        report=str(page),
        table=str(table),
    )
    (out / "demo.json").write_text(json.dumps(demo.to_json(), indent=2) + "\n", encoding="utf-8")
    return demo


def new_folder(wanted: Path) -> Path:
    """``wanted``, or with a number behind it if it exists already."""
    numbered = (wanted.with_name(f"{wanted.name}-{n}") for n in itertools.count(2))
    return next(path for path in itertools.chain([wanted], numbered) if not path.exists())


def auroc_by_kind(
    scorer: Scorer, normal: DigitGrids, anomalous: DigitGrids
) -> dict[str, dict[str, float]]:
    """AUROC of every score, for each kind of anomaly against the same normal grids."""
    kinds = np.array(anomalous.kinds)
    raw_normal = scorer.raw_scores(normal.as_image_set())
    raw_anomalous = scorer.raw_scores(anomalous.as_image_set())
    aurocs: dict[str, dict[str, float]] = {}
    for name in SCORES:
        calm = scorer.z_score(name, raw_normal[name]).numpy()
        aurocs[name] = {}
        for kind in KINDS:
            odd = scorer.z_score(name, raw_anomalous[name]).numpy()[kinds == kind]
            labels = np.repeat([0, 1], [len(calm), len(odd)])
            aurocs[name][kind] = round(image_auroc(labels, np.concatenate([calm, odd])), 4)
    return aurocs


def _screen(scorer: Scorer, images: Path, out: Path) -> tuple[dict[str, Any], Path, Path]:
    """Screen a folder as a user would; returns the summary, the table and the report."""
    table, page = out / "results.csv", out / "report.html"
    summary = screen_to_table(scorer, images, table)
    assert summary is not None  # nothing stops it
    write_report(
        page,
        scorer,
        summary,
        title="DigitAnatomy screening report",
        inputs=images,
        model_name=PRESET,
        results=table,
        reference_z=scorer.reference_z,
    )
    return summary.as_dict(), table, page


def _write_pngs(folder: Path, normal: DigitGrids, anomalous: DigitGrids) -> Path:
    """What a user would have: a folder of images, named by what is in them."""
    image = require("PIL.Image", "screen")
    folder.mkdir(parents=True, exist_ok=True)
    for grids in (normal, anomalous):
        for number, (kind, pixels) in enumerate(zip(grids.kinds, grids.images, strict=True)):
            image.fromarray(pixels[0].numpy()).save(folder / f"{kind}-{number:04d}.png")
    return folder
