"""A whole training run: data in, a calibrated bundle out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..data import ImageSet, Record, load_images, select
from ..inference import calibrate
from ..inference.bundle import Bundle, save_bundle
from ..inference.scores import PAPER_SCORE
from ..modules import SQUID
from ..presets import Preset, Recipe
from ..utils.devices import Precision, choose_device
from ..utils.machine import describe
from ..utils.threads import threads
from .distributed import Processes
from .logs import LogKind
from .loop import Observe, Progress, TrainingResult, train

NORMAL = 0


def load_splits(
    records: list[Record], size: int, on_progress: Callable[[int, int], None] | None = None
) -> tuple[ImageSet, ImageSet | None]:
    """The normal training images, and the validation images of both kinds if there are any.

    Images of unknown label are taken as normal for training: the method needs no labels.

    Raises:
        ValueError: no training images.
    """
    training = [
        record
        for record in records
        if record.split in ("train", None) and record.label in (NORMAL, None)
    ]
    if not training:
        raise ValueError(
            f"none of the {len(records)} images is a normal one for training; a split 'train' "
            "with normal or unlabelled images is needed."
        )
    validation = [record for record in select(records, "val") if record.label is not None]
    images = load_images(training + validation, size, on_progress=on_progress)
    numbers = torch.arange(len(images))
    train_set = images.subset(numbers[: len(training)])
    return train_set, images.subset(numbers[len(training) :]) if validation else None


def train_bundle(
    preset: Preset,
    train_set: ImageSet,
    out: Path,
    *,
    recipe: Recipe | None = None,
    validation_set: ImageSet | None = None,
    seconds: float | None = None,
    score: str = PAPER_SCORE,
    false_positive_rate: float = 0.05,
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "auto",
    thread_count: int | None = None,
    resume: bool = False,
    sync_batch_norm: bool = True,
    graphs: bool = True,
    log: LogKind = "csv",
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    observe: Observe = lambda model, epoch: {},
    about: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train a preset and, once it is finished, calibrate it and write the bundle into ``out``.

    Under torchrun the process of rank 0 calibrates and writes.

    See ``squid_fast.training.train`` for the arguments it shares; ``score`` is the one that the
    bundle screens by, ``about`` what else the bundle is to say of itself.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SQUID(**preset.model)
    recipe = recipe or preset.recipe
    result = train(
        model,
        train_set,
        out,
        recipe,
        validation_set=validation_set,
        seconds=seconds,
        seed=seed,
        device=device,
        precision=precision,
        thread_count=thread_count,
        resume=resume,
        sync_batch_norm=sync_batch_norm,
        graphs=graphs,
        log=log,
        report=report,
        should_stop=should_stop,
        observe=observe,
    )
    processes = Processes.from_environment()
    if not result.finished or not processes.is_main:
        return result
    normal = validation_set.normal if validation_set else None
    with threads(result.threads):
        calibration = calibrate(
            result.model,
            result.discriminator,
            train_set,
            normal,
            false_positive_rate,
            precision,
            device,
        )
    facts = {
        "preset": preset.name,
        "recipe": asdict(recipe),
        "seed": seed,
        "epoch": result.epoch,
        "training_images": len(train_set),
        "training_minutes": round(result.minutes, 2),
        "validation": result.validation,
        "machine": describe(choose_device(device))
        | {"threads": result.threads, "processes": processes.count},
        **(about or {}),
    }
    bundle = Bundle(result.model, result.discriminator, calibration, score, facts)
    save_bundle(bundle, out)
    return result
