"""Whole training runs of SQUID: images in, a trained pair or a calibrated bundle out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from ..data import ImageSet, Record, load_images, select
from ..data.records import NORMAL, overview
from ..inference import calibrate
from ..inference.bundle import Bundle, save_bundle
from ..inference.calibration import check_calibration, check_normal
from ..inference.scores import PAPER_SCORE, SCORES
from ..modules import SQUID, Discriminator
from ..presets import Preset, Recipe
from ..utils.arguments import check_json, check_kind, is_number
from ..utils.devices import Precision, choose_device, choose_precision, to_layout
from ..utils.extras import require
from ..utils.machine import describe
from ..utils.seeds import check_seed, seeded
from ..utils.threads import check_threads, threads
from .checkpoint import prepare_folder
from .distributed import Processes
from .logs import LogKind, check_log
from .loop import Progress, fit, has_both_classes
from .squid import SquidLearner
from .state import Run, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

Observe = Callable[[SQUID, int], dict[str, float]]


@dataclass
class TrainingResult:
    """The trained pair, on the CPU in evaluation mode, and how the run went.

    With ``recipe.ema_decay`` the discriminator is the averaged one. A finished run whose recipe
    keeps the best pair gives that one, on rank 0; other ranks and stopped runs give the last.

    Attributes:
        step: number of steps that are done.
        finished: whether the run came to its end; False where it was stopped before.
        epoch: epoch of the pair, counted from 1.
        minutes: duration of the run, including what ran before it was resumed.
        threads: number of threads that PyTorch computed with.
        validation: AUROCs of the pair by name.

    >>> from squid_fast import PRESETS, SQUID, Discriminator
    >>> pair = SQUID(**PRESETS["small"].model), Discriminator(size=2)
    >>> result = TrainingResult(*pair, 90, True, epoch=3, minutes=1.5, threads=2)
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

    Images of unknown label are taken as normal for training: the method needs no labels. ``size``
    is the side in pixels that images are read at; ``on_progress`` is called with (done, total).

    Raises:
        ValueError: no training images.

    >>> from PIL import Image
    >>> Image.new("L", (64, 64)).save("a.png")
    >>> train_set, validation_set = load_splits([Record(Path("a.png"), NORMAL, "train")], size=48)
    >>> train_set.paths, validation_set
    (['a.png'], None)
    """
    training = [r for r in records if r.split in ("train", None) and r.label in (NORMAL, None)]
    if not training:
        raise ValueError(
            f"there are no images to train on ({overview(records)}); a split 'train' with normal "
            "or unlabelled images is needed."
        )
    validation = [record for record in select(records, "val") if record.label is not None]
    images = load_images(training + validation, size, on_progress=on_progress)
    is_training = torch.arange(len(images), device="cpu") < len(training)
    return images.subset(is_training), images.subset(~is_training) if validation else None


def train(
    model: SQUID,
    train_set: ImageSet,
    out: str | Path,
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
        model: a new model; training starts from its weights unless it resumes.
        train_set: normal images of the model's size.
        out: run folder; gets ``checkpoint.pt`` and the log.
        validation_set: labelled images; with both classes their AUROC is computed every
            ``recipe.validate_every`` epochs.
        seconds: end the run after this time instead of after ``recipe.epochs``. The learning rate
            then falls with the time as it would with the epochs, and ``should_stop`` ends the run
            as if its time were up.
        seed: seed of the discriminator's weights and of everything drawn in training.
        device, precision: see ``squid_fast.utils.devices``. float32 is computed in float32 on a GPU
            too, never in TF32.
        thread_count: number of PyTorch's threads, on a CPU. Unless given, a resumed run goes on
            with its own number, and another tries PyTorch's number, its half and so on and takes
            the one with which steps are fastest; with ``seconds``, it tries again every minute.
            Runs with the same seed and the same number of threads have the same bits.
        resume: go on from ``out/checkpoint.pt``, on any number of processes.
        sync_batch_norm: normalise over the batches of all processes.
        graphs: replay the step as a CUDA graph, on one GPU; elsewhere of no effect.
        report: called after every step; calling ``losses()`` waits for the device.
        should_stop: called after every step; when it returns true, the run saves and returns.
        observe: called with the model and the epoch, counted from 0, after every validation; the
            figures it returns go into the log. It must leave the model as it is.

    Raises:
        ValueError: the images do not fit the model or are fewer than a batch, a batch cannot be
            shared out over the processes, the hardware does not compute in bf16, or a number is
            out of its range.
        CheckpointError: nothing to resume, or from a run with other settings.
        NonFiniteLossError: a loss became NaN or infinite.

    >>> from squid_fast import PRESETS, SQUID
    >>> pixels = torch.randint(256, (4, 1, 48, 48), dtype=torch.uint8)
    >>> images = ImageSet(pixels, labels=torch.zeros(4).long(), paths=["a", "b", "c", "d"])
    >>> model, recipe = SQUID(**PRESETS["small"].model), Recipe(epochs=1, batch_size=2)
    >>> train(model, images, Path("run"), recipe, device="cpu", precision="float32").step
    2
    """
    out = Path(out)
    check_sets(train_set, validation_set, model.image_size)
    check_kind("recipe", recipe, Recipe)
    processes = Processes.from_environment()
    processes.check_batch(recipe.batch_size)
    check_seed(seed)
    check_threads(thread_count)
    check_log(log)
    if seconds is not None and not (is_number(seconds) and 0 < seconds < math.inf):
        raise ValueError(f"seconds is {seconds!r}; it must be a number above 0, or None.")
    require("lightning_fabric", "train")
    if has_both_classes(validation_set):
        require("sklearn.metrics", "train")
    where = choose_device(device)
    check_context(where)
    chosen = choose_precision(precision, where)
    settings = Settings(model.config, recipe, seed, chosen, len(train_set), train_set.fingerprint)
    prepare_folder(out, resume)
    learner = SquidLearner(model, settings, where, processes, sync_batch_norm, graphs)
    with closing(Run(learner, settings, out, log, resume)) as run:
        finished = fit(
            run, train_set, validation_set, thread_count=thread_count, seconds=seconds,
            report=report, should_stop=should_stop, observe=lambda epoch: observe(model, epoch),
        )  # fmt: skip
    for module in learner.trained.values():
        to_layout(module.eval().cpu(), torch.contiguous_format)
    assert run.threads is not None
    pair = model, learner.trained_discriminator
    return TrainingResult(
        *pair, run.step, finished, run.epoch, run.minutes, run.threads, run.validation
    )


def check_sets(train_set: ImageSet, validation_set: ImageSet | None, side: int | None) -> None:
    """Raise TypeError or ValueError unless there is what to train on, of that side.

    The images of the first have to be normal or of unknown label, those of the other labelled.
    """
    check_normal("train_set", train_set, side)
    if validation_set is None:
        return
    check_kind("validation_set", validation_set, ImageSet)
    check_normal("validation_set", validation_set.normal, side)
    if bad := int(((validation_set.labels < 0) | (validation_set.labels > 1)).sum()):
        raise ValueError(
            f"{bad} of {len(validation_set)} images of validation_set have labels other than 0, "
            "normal, and 1, anomalous."
        )


def check_context(device: torch.device) -> None:
    """Raise ValueError where PyTorch would compute no gradients, or in another precision.

    >>> with torch.no_grad():
    ...     check_context(torch.device("cpu"))
    Traceback (most recent call last):
    ValueError: training takes gradients, which torch.no_grad() and the like switch off; call ...
    """
    if not torch.is_grad_enabled():
        raise ValueError(
            "training takes gradients, which torch.no_grad() and the like switch off; call it "
            "outside of them."
        )
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "training is called inside torch.autocast, but its own argument precision says what "
            "it computes in; call it outside."
        )


class TrainOptions(TypedDict, total=False):
    """Arguments of ``train`` that ``train_bundle`` passes on."""

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
    out: str | Path,
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
    """Train a preset and, once training is over, calibrate it and write the bundle to ``out``.

    Under torchrun the process of rank 0 calibrates and writes.

    Args:
        recipe: by default that of the preset.
        score: the score that the bundle screens by.
        false_positive_rate: share of normal images above the threshold of that score.
        about: further facts that the bundle states about its training.
        options: further keyword arguments of ``train``, which describes all others too.

    Raises:
        ValueError: as ``train`` does, an unknown score, or too few normal images for the rate: all
            before training.

    >>> from squid_fast import PRESETS
    >>> pixels = torch.randint(256, (4, 1, 48, 48), dtype=torch.uint8)
    >>> images = ImageSet(pixels, labels=torch.zeros(4).long(), paths=["a", "b", "c", "d"])
    >>> options = {"recipe": Recipe(epochs=1, batch_size=2), "false_positive_rate": 0.25}
    >>> result = train_bundle(PRESETS["small"], images, Path("bundle"), **options)
    >>> Path("bundle/model.safetensors").exists()
    True
    """
    check_kind("preset", preset, Preset)
    check_sets(train_set, validation_set, preset.image_size)
    check_json("about", about or {})
    if score not in tuple(SCORES):
        raise ValueError(f"score is {score!r}; it must be one of {', '.join(SCORES)}.")
    normal = validation_set.normal if validation_set else None
    check_calibration(len(train_set), len(normal) if normal else 0, false_positive_rate)
    check_seed(seed)
    with seeded(seed), torch.device("cpu"):
        model = SQUID(**preset.model)
    recipe = recipe or preset.recipe
    result = train(
        model, train_set, out, recipe, validation_set=validation_set, seed=seed, device=device,
        precision=precision, **options,
    )  # fmt: skip
    processes = Processes.from_environment()
    if not result.finished or not processes.is_main:
        return result
    pair = result.model, result.discriminator
    with threads(result.threads):
        calibration = calibrate(*pair, train_set, normal, false_positive_rate, precision, device)
    used = {"threads": result.threads, "processes": processes.count}
    facts = {
        "preset": preset.name, "recipe": asdict(recipe), "seed": seed, "epoch": result.epoch,
        "training_images": len(train_set), "training_minutes": round(result.minutes, 2),
        "validation": result.validation, "machine": describe(choose_device(device)) | used,
        **(about or {}),
    }  # fmt: skip
    save_bundle(Bundle(*pair, calibration, score, facts), out)
    return result
