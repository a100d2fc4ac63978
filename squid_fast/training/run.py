"""Whole training runs of SQUID: images in, a trained pair or a calibrated bundle out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from ..data import ImageSet, Record, load_images, select
from ..data.records import NORMAL
from ..inference import calibrate
from ..inference.bundle import Bundle, save_bundle
from ..inference.scores import PAPER_SCORE
from ..modules import SQUID, Discriminator
from ..presets import Preset, Recipe
from ..utils.devices import Precision, choose_device, choose_precision, to_layout
from ..utils.machine import describe
from ..utils.threads import threads
from .checkpoint import prepare_folder
from .distributed import Processes
from .logs import LogKind
from .loop import Progress, fit
from .squid import SquidLearner
from .state import Run, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

Observe = Callable[[SQUID, int], dict[str, float]]


@dataclass
class TrainingResult:
    """The trained pair, on the CPU in evaluation mode, and how the run went.

    With ``recipe.ema_decay`` the discriminator is the averaged one. A finished run whose recipe
    keeps the best gives that pair and its validation, on rank 0; elsewhere and before the end it is
    the last.

    Attributes:
        model, discriminator: the trained pair.
        step: number of steps that are done.
        finished: whether the run is over, and was not stopped.
        epoch: epoch of the pair, counted from 1.
        minutes: what the run took, before a resumption too.
        threads: number of threads that PyTorch computed with.
        validation: AUROCs of the pair by name.

    Example:
        >>> from squid_fast import PRESETS, SQUID, Discriminator
        >>> result = TrainingResult(
        ...     SQUID(**PRESETS["small"].model), Discriminator(size=2), step=90, finished=True,
        ...     epoch=3, minutes=1.5, threads=2, validation={"auroc_patch_error": 0.9},
        ... )
        >>> f"{result.step} steps, {60 * result.minutes / result.step:.0f} s each"
        '90 steps, 1 s each'
    """

    model: SQUID
    discriminator: Discriminator
    step: int
    finished: bool
    epoch: int
    minutes: float
    threads: int
    validation: dict[str, float] = field(default_factory=dict)


def load_splits(
    records: list[Record], size: int, on_progress: Callable[[int, int], None] | None = None
) -> tuple[ImageSet, ImageSet | None]:
    """The normal training images, and the validation images of both kinds if there are any.

    Images of unknown label are taken as normal for training: the method needs no labels.

    Args:
        records: image files with split and label.
        size: side in pixels that the images are read at.
        on_progress: called with the numbers of images read so far and in all.

    Raises:
        ValueError: no training images.

    Example:
        >>> from squid_fast.data import Record
        >>> from PIL import Image
        >>> splits = {"a.png": ("train", 0), "b.png": ("train", 1), "c.png": ("val", 1)}
        >>> for name in splits:
        ...     Image.new("L", (64, 64)).save(name)
        >>> records = [Record(Path(name), label, split) for name, (split, label) in splits.items()]
        >>> train_set, validation_set = load_splits(records, size=48)
        >>> train_set.paths, validation_set.paths
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


def train(
    model: SQUID,
    train_set: ImageSet,
    out: Path,
    recipe: Recipe,
    *,
    validation_set: ImageSet | None = None,
    seconds: float | None = None,
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
) -> TrainingResult:
    """Train ``model`` and a new discriminator on normal images (paper section 3.5).

    Under torchrun all processes train together, see ``squid_fast.training.distributed``; each has
    to call this with the same arguments. Images and augmentation are those of one process, masks
    are drawn anew on every rank.

    Args:
        model: freshly built; its weights are what training starts from unless it resumes.
        train_set: normal images of the model's size.
        out: run folder; gets ``checkpoint.pt`` and the log.
        recipe: weights, rates, epochs.
        validation_set: labelled images; with both classes their AUROC is computed every
            ``recipe.validate_every`` epochs.
        seconds: end by the clock, after so many, instead of after ``recipe.epochs``. The learning
            rate falls with the time that is left as it would with the epochs, and ``should_stop``
            ends the run as if its time were up.
        seed: seed of the discriminator's weights and of everything drawn in training.
        device, precision: see ``squid_fast.utils.devices``.
        thread_count: number of PyTorch's threads, on a CPU. Unless given, that of the run that is
            resumed, else of PyTorch's own number, its half and so on the one with which a few steps
            took the least time; by the clock, timed anew now and then. With the same number a run
            with the same seed has the same bits.
        resume: go on from ``out/checkpoint.pt``, on any number of processes.
        sync_batch_norm: normalise over the batches of all processes.
        graphs: replay the step as a CUDA graph, on one GPU; elsewhere of no effect.
        log: "csv" or "tensorboard".
        report: told about every step; reading ``losses()`` waits for the device.
        should_stop: asked after every step; when true the run saves and returns.
        observe: shown the model after every validation, with the epoch counted from 0; the figures
            it returns go into the log. It must leave the model as it is.

    Raises:
        ValueError: the images do not fit the model or are fewer than a batch, a batch cannot be
            shared out over the processes, or the hardware does not compute in bf16.
        CheckpointError: nothing to resume, or from a run with other settings.
        NonFiniteLossError: a loss became NaN or infinite.

    Example:
        >>> from squid_fast import PRESETS, SQUID
        >>> from squid_fast.data import DigitAnatomy
        >>> images = DigitAnatomy(None, 16, "train").normal(4, seed=0).as_image_set()
        >>> model, recipe = SQUID(**PRESETS["small"].model), Recipe(epochs=1, batch_size=2)
        >>> result = train(model, images, Path("run"), recipe, device="cpu")
        >>> result.step, result.finished
        (2, True)
        >>> sorted(path.name for path in Path("run").iterdir())
        ['checkpoint.pt', 'metrics.csv']
    """
    processes = Processes.found()
    processes.check_batch(recipe.batch_size)
    if train_set.images.shape[-1] != model.image_size:
        raise ValueError(
            f"the images are {train_set.images.shape[-1]} pixels wide; the model takes "
            f"{model.image_size}."
        )
    where = choose_device(device)
    settings = Settings.of(
        model.config, recipe, seed, choose_precision(precision, where), train_set
    )
    prepare_folder(out, resume)
    learner = SquidLearner(model, settings, where, processes, sync_batch_norm, graphs)
    with closing(Run(learner, settings, out, log, resume)) as run:
        finished = fit(
            run,
            train_set,
            validation_set,
            seconds=seconds,
            thread_count=thread_count,
            report=report,
            should_stop=should_stop,
            observe=lambda epoch: observe(model, epoch),
        )
    for module in learner.trained.values():
        to_layout(module.eval().cpu(), torch.contiguous_format)
    assert run.threads is not None
    return TrainingResult(
        model,
        learner.trained_discriminator,
        run.step,
        finished,
        run.epoch,
        run.minutes,
        run.threads,
        dict(run.validation),
    )


class TrainOptions(TypedDict, total=False):
    """What ``train_bundle`` passes on to ``train``, which describes it."""

    seconds: float | None
    thread_count: int | None
    resume: bool
    sync_batch_norm: bool
    graphs: bool
    log: LogKind
    report: Callable[[Progress], None]
    should_stop: Callable[[], bool]
    observe: Observe


def train_bundle(
    preset: Preset,
    train_set: ImageSet,
    out: Path,
    *,
    recipe: Recipe | None = None,
    validation_set: ImageSet | None = None,
    score: str = PAPER_SCORE,
    false_positive_rate: float = 0.05,
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "auto",
    about: Mapping[str, Any] | None = None,
    **options: Unpack[TrainOptions],
) -> TrainingResult:
    """Train a preset and, once it is finished, calibrate it and write the bundle into ``out``.

    Under torchrun the process of rank 0 calibrates and writes.

    Args:
        preset: the model, and the recipe unless one is given.
        score: the score that the bundle screens by.
        false_positive_rate: share of normal images that its threshold lets pass as anomalous.
        about: what else the bundle is to say of itself.
        options: further keywords of ``squid_fast.training.train``, which describes them and those
            that are not described here.

    Example:
        >>> from squid_fast import PRESETS, Scorer
        >>> from squid_fast.data import DigitAnatomy
        >>> images = DigitAnatomy(None, 16, "train").normal(4, seed=0).as_image_set()
        >>> recipe = Recipe(epochs=1, batch_size=2)
        >>> train_bundle(PRESETS["small"], images, Path("run"), recipe=recipe, device="cpu").step
        2
        >>> Scorer.load("run", device="cpu").score(images.images).z_score.shape
        torch.Size([4])
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
        seed=seed,
        device=device,
        precision=precision,
        **options,
    )
    processes = Processes.from_environment()
    if not result.finished or not processes.is_main:
        return result
    normal = None
    if validation_set is not None:
        normal = validation_set.subset(validation_set.labels == NORMAL)
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
