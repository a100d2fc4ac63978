"""The whole method on synthetic data: draw, train, evaluate, screen, report."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import KINDS, DigitAnatomy, DigitGrids
from ..inference import Scorer
from ..inference.scores import PAPER_SCORE, SCORES
from ..metrics import image_auroc
from ..presets import preset
from ..screening import screen_to_table, write_report
from ..training import Progress, train_bundle
from ..training.checkpoint import check_run_folder
from ..utils.devices import choose_device
from ..utils.extras import require
from ..utils.machine import describe
from ..utils.outputs import check_folder
from ..utils.seeds import check_seed
from ..utils.threads import threads

if sys.platform != "win32":
    import fcntl

PRESET = "small"
SCORE = "patch_error"
SHOWN = (SCORE, *(name for name in reversed(SCORES) if name != SCORE))
TRAINING_GRIDS = 4000
HELD_OUT_GRIDS = 400  # normal for thresholds, normal for the test, and of each kind of anomaly
WHY_NOT_THE_PAPERS = (
    "rates how real a reconstruction looks, which tells wrong digits from right ones only once "
    "reconstructions are as sharp as real digits, for which minutes of training are too few."
)
_RESULT = "demo.json"
_REPLACED = (
    "checkpoint.pt", "config.json", "calibration.json", "model.safetensors",
    "discriminator.safetensors", "results.csv", "results.csv.partial", "report.html", "grids",
)  # fmt: skip
"""Files of an earlier demo, which the next one in the same folder deletes."""


@dataclass(frozen=True)
class DemoResult:
    """Results of a demo, on grids of unseen handwriting.

    Attributes:
        aurocs: AUROC by score and kind of anomaly; the score that fits such images best is first.
        score: the score that the trained model ranks and flags by.
        stopped: whether training was stopped before its time was up.
        trained_grids: number of grids that training saw, repetitions counted.
        training_seconds, seconds: duration of training, and of the whole demo.
        machine: see ``utils.machine.describe``; ``threads`` are those at the end of training.
        screened: summary of the screening, whose files are ``report`` and ``table``.
    """

    aurocs: dict[str, dict[str, float]]
    score: str
    stopped: bool
    trained_grids: int
    training_seconds: float
    seconds: float
    machine: dict[str, Any]
    screened: dict[str, Any]
    report: str
    table: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"paper_score": PAPER_SCORE}

    def summary(self) -> str:
        weakest = min(self.aurocs[self.score].values())
        stopped = ", when it was stopped" if self.stopped else ""
        return (
            f"{self.score}: {SCORES[self.score][1]}; at least {weakest:.2f} for every kind.\n"
            f"{PAPER_SCORE}, the paper's, {WHY_NOT_THE_PAPERS}\n"
            f"trained on {self.trained_grids} grids in {self.training_seconds:.0f} s{stopped}; "
            f"{self.seconds:.0f} s in all\nresults: {self.table}\nreport:  {self.report}"
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
) -> DemoResult:
    """Run the demo into ``out``.

    Args:
        minutes: time until training ends, counted from this call. A fast machine trains more steps
            in that time; on any, the learning rate falls with the time that is left.
        source: folder of MNIST's IDX files; by default the digits bundled with scikit-learn.
        should_stop: once true, ends the training; the model is then evaluated as it is.

    Raises:
        ValueError: ``minutes``, ``seed`` or ``device`` does not fit.
        CheckpointError: ``out`` already holds a run.
    """
    started = time.perf_counter()
    check_demo(minutes, source, seed, device)
    check_run_folder(out, resume=False)
    chosen = preset(PRESET)
    size, cell = chosen.image_size, chosen.image_size // 3
    say(f"drawing {TRAINING_GRIDS} normal grids of {size} x {size} pixels")
    training = DigitAnatomy(source, cell, "train", seed).normal(TRAINING_GRIDS, seed)
    validation = DigitAnatomy(source, cell, "val", seed).normal(HELD_OUT_GRIDS, seed + 1)
    say(f"training until {minutes:g} minutes are over; Ctrl-C ends it earlier")
    begun = time.perf_counter()
    given = max(60 * minutes - (begun - started), 1e-3)  # at least one step
    result = train_bundle(
        chosen, training.as_image_set(), out,
        validation_set=validation.as_image_set(), seconds=given, score=SCORE, seed=seed,
        device=device, report=report, should_stop=should_stop,
    )  # fmt: skip
    seconds = time.perf_counter() - begun

    say("evaluating and screening unseen grids")
    scorer = Scorer.load(out, device=device)
    unseen = DigitAnatomy(source, cell, "test", seed)
    normal = unseen.normal(HELD_OUT_GRIDS, seed + 2)
    anomalous = unseen.anomalous(HELD_OUT_GRIDS * len(KINDS), seed + 3)
    images = _write_pngs(out / "grids", normal, anomalous)
    with threads(result.threads):
        screened, table, page = _screen(scorer, images, out)
        aurocs = auroc_by_kind(scorer, normal, anomalous)
    demo = DemoResult(
        aurocs, score=SCORE, stopped=60 * result.minutes < given,
        trained_grids=result.step * chosen.recipe.batch_size, training_seconds=round(seconds, 1),
        seconds=round(time.perf_counter() - started, 1),
        machine=describe(choose_device(device)) | {"threads": result.threads},
        screened=screened, report=str(page), table=str(table),
    )  # fmt: skip
    # Written in place, not replaced, since the lock of ``demo_folder`` is on this very file.
    (out / _RESULT).write_text(json.dumps(demo.to_json(), indent=2) + "\n", encoding="utf-8")
    return demo


def check_demo(minutes: float, source: Path | None, seed: int, device: str | None) -> None:
    """Raise what ``run_demo`` can before it draws, and before an earlier demo is deleted."""
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes}; it must be a number above 0.")
    check_seed(seed)
    choose_device(device)
    for module in ("lightning_fabric", "sklearn.metrics", "PIL.Image"):
        require(module, "train")
    require("jinja2", "screen")
    if source is not None:
        DigitAnatomy(source, seed=seed)


@contextmanager
def demo_folder(wanted: Path) -> Iterator[Path]:
    """Give the folder ``wanted``, from which the files of an earlier demo are deleted.

    If it holds something else, or if a demo is running there, a number is added to its name.
    """
    check_folder(wanted)
    numbered = (wanted.with_name(f"{wanted.name}-{n}") for n in itertools.count(2))
    for folder in itertools.chain([wanted], numbered):
        if folder.exists() and not (folder / _RESULT).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / _RESULT, "a") as file:
            if sys.platform != "win32":
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                except OSError:
                    pass  # a network file system without locks
            for path in (folder / name for name in _REPLACED):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            yield folder
            return


def auroc_by_kind(
    scorer: Scorer, normal: DigitGrids, anomalous: DigitGrids
) -> dict[str, dict[str, float]]:
    """AUROC of every score for each kind of anomaly, against the same normal grids."""
    raw = [scorer.raw_scores(grids.as_image_set()) for grids in (normal, anomalous)]
    kinds = np.array(anomalous.kinds)
    aurocs: dict[str, dict[str, float]] = {name: {} for name in SHOWN}
    for name, by_kind in aurocs.items():
        normal_z, anomalous_z = (scorer.z_score(name, values[name]).numpy() for values in raw)
        for kind in KINDS:
            z = np.concatenate([normal_z, anomalous_z[kinds == kind]])
            labels = np.arange(len(z)) >= len(normal_z)
            by_kind[kind] = round(image_auroc(labels, z), 4)
    return aurocs


def _screen(scorer: Scorer, images: Path, out: Path) -> tuple[dict[str, Any], Path, Path]:
    """Screen a folder as a user would, and return the summary, the table and the report."""
    table, page = out / "results.csv", out / "report.html"
    summary = screen_to_table(scorer, images, table)
    assert summary is not None  # nothing stops it
    write_report(
        page, scorer, summary, title="DigitAnatomy screening report", inputs=images,
        model_name=PRESET, results=table, reference_z=scorer.reference_z,
    )  # fmt: skip
    return summary.as_dict(), table, page


def _write_pngs(folder: Path, normal: DigitGrids, anomalous: DigitGrids) -> Path:
    """Write a folder of images, named by the kind of anomaly, as a user might have."""
    image = require("PIL.Image", "screen")
    folder.mkdir(parents=True, exist_ok=True)
    for grids in (normal, anomalous):
        for number, (kind, pixels) in enumerate(zip(grids.kinds, grids.images, strict=True)):
            image.fromarray(pixels[0].numpy()).save(folder / f"{kind}-{number:04d}.png")
    return folder
