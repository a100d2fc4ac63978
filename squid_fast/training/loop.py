"""The training loop: epochs, validation, checkpoints, interruption and resumption.

Lightning Fabric carries device and precision; the loop is ours because it shares one generator
forward between two losses and must be able to stop and go on between any two steps. All
randomness of a step is a function of (seed, step), so a resumed run draws what an uninterrupted
one would have drawn and no generator state has to be kept.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..data import ImageSet
from ..devices import Precision, choose_device, choose_precision, to_layout
from ..evaluation import image_auroc
from ..inference import Scorer
from ..modules import SQUID, Discriminator
from ..presets import Recipe
from ..scores import SCORES
from .augment import augment
from .checkpoint import CheckpointError, load_checkpoint
from .distributed import Processes
from .graphs import Losses, Step, StepGraphs
from .logs import LogKind, NoLogger, make_logger
from .state import CHECKPOINT, Run, Settings
from .step import set_learning_rate

_TIMED, _WARM_UP = 24, 8  # steps


Observe = Callable[[SQUID, int], dict[str, float]]


@dataclass(frozen=True)
class Progress:
    """What a reporter is told after every step, and after every validation.

    ``losses`` are the means of this epoch so far, weighted as in the recipe; ``validation`` holds
    AUROCs by name when this step ended with one.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    losses: Callable[[], dict[str, float]]
    validation: dict[str, float] | None = None


@dataclass
class TrainingResult:
    """The trained pair, on the CPU in evaluation mode, and how the run went.

    With ``recipe.averaging`` the discriminator is the averaged one. A finished run whose recipe
    keeps the best gives that pair and its validation, on rank 0; elsewhere and before the end it is
    the last. ``epoch`` is the pair's, counted from 1; ``minutes`` are all that the run took, before
    a resumption too.
    """

    model: SQUID
    discriminator: Discriminator
    step: int
    finished: bool
    epoch: int
    minutes: float
    validation: dict[str, float] = field(default_factory=dict)


def train(
    model: SQUID,
    train_set: ImageSet,
    out: Path,
    recipe: Recipe,
    *,
    validation_set: ImageSet | None = None,
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "auto",
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
        out: run folder; gets ``checkpoint.pt`` and the logs.
        recipe: weights, rates, epochs.
        validation_set: labelled images; with both classes their AUROC is computed every
            ``recipe.validate_every`` epochs.
        seed: of the discriminator's weights and of everything drawn in training.
        device, precision: see ``squid_fast.devices``.
        resume: go on from ``out/checkpoint.pt``, on any number of processes.
        sync_batch_norm: normalise over the batches of all processes.
        graphs: replay the step as a CUDA graph, on one GPU; elsewhere of no effect.
        log: "csv" or "tensorboard".
        report: told about every step; reading ``losses()`` waits for the device.
        should_stop: asked after every step; when true the run saves and returns.
        observe: shown the model after every validation, with the epoch counted from 0; the figures
            it returns go into the log. It must leave the model as it is.

    Raises:
        ValueError: the images do not fit the model or are fewer than a batch, or a batch cannot be
            shared out over the processes.
        CheckpointError: nothing to resume, or from a run with other settings.
        NonFiniteLossError: a loss became NaN or infinite.
    """
    processes = Processes.found()
    processes.check_batch(recipe.batch_size)
    _check_images(model, train_set, recipe)
    where = choose_device(device)
    chosen = choose_precision(precision, where)
    settings = Settings(model.config, recipe, seed, chosen, len(train_set), train_set.fingerprint)
    out.mkdir(parents=True, exist_ok=True)
    if not resume and (out / CHECKPOINT).exists():
        raise CheckpointError(
            f"{out} already holds a run; add --resume to go on with it, or choose another folder."
        )
    run = Run(model, settings, where, processes, sync_batch_norm, graphs)
    if resume:
        run.load(load_checkpoint(out / CHECKPOINT), settings)
    logger = make_logger(log, out, run.step) if processes.is_main else NoLogger()
    try:
        with torch.random.fork_rng():  # the steps' seeds do not reach the caller
            return _loop(
                run, train_set, validation_set, out, settings, logger.log, report, should_stop,
                observe,
            )  # fmt: skip
    finally:
        logger.close()
        run.close()


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """The generator's cosine schedule: ``lr`` at epoch 0, ``lr_floor * lr`` at ``t_max``.

    Past ``t_max`` it rises again, as the published schedule does.
    """
    cosine = (1 + math.cos(math.pi * epoch / recipe.t_max)) / 2
    return recipe.lr * (recipe.lr_floor + (1 - recipe.lr_floor) * cosine)


def seconds_per_step(
    model: SQUID,
    images: ImageSet,
    recipe: Recipe,
    device: str | None = None,
    precision: Precision = "auto",
) -> float:
    """Time of a training step here, median of a few; trains ``model``, which is then spent."""
    where = choose_device(device)
    chosen = choose_precision(precision, where)
    run = Run(model, Settings(model.config, recipe, 0, chosen, len(images), ""), where)
    batch = images.batch(slice(0, recipe.batch_size), where).to(memory_format=run.layout)
    seconds = []
    for _ in range(_TIMED):
        started = time.perf_counter()
        for index in range(recipe.n_critic):
            run.add(run.trainer.step(batch, index))
        run.means()  # waits for the device
        seconds.append((time.perf_counter() - started) / recipe.n_critic)
    return statistics.median(seconds[_WARM_UP:])


def _loop(
    run: Run,
    train_set: ImageSet,
    validation_set: ImageSet | None,
    out: Path,
    settings: Settings,
    log: Callable[[int, dict[str, float]], None],
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    observe: Observe,
) -> TrainingResult:
    recipe, device = settings.recipe, run.fabric.device
    images = train_set.to(device)
    per_epoch = len(images) // recipe.batch_size
    steps = recipe.epochs * per_epoch
    step = _step_of(run, images, settings)
    stopped = False
    while run.step < steps and not stopped:
        epoch, first = divmod(run.step, per_epoch)
        set_learning_rate(run.optimizers[0], learning_rate(recipe, epoch))
        if first == 0:
            run.sums = {}
        order = torch.randperm(len(images), generator=_generator(settings.seed, epoch))
        for index in range(first, per_epoch):
            chosen = order[index * recipe.batch_size : (index + 1) * recipe.batch_size]
            torch.manual_seed(_step_seed(settings.seed, run.step))
            run.add(step(chosen.to(device), run.step))
            run.step += 1
            validation = None
            if index == per_epoch - 1:
                validation = _end_epoch(run, epoch, validation_set, out, settings, log, observe)
            report(Progress(epoch, recipe.epochs, run.step, steps, run.means, validation))
            if device.type == "cpu":
                run.means()  # waiting costs nothing there, and stops at the first NaN
            last = index == per_epoch - 1
            if stopped := run.processes.agree(should_stop(), device, run.step, last):
                break
    run.save(settings, out)
    finished = run.step >= steps
    epoch, validation = math.ceil(run.step / per_epoch), dict(run.validation)
    if finished and run.best is not None:
        run.model.load_state_dict(run.best.generator)
        run.judge.load_state_dict(run.best.discriminator)
        epoch, validation = run.best.epoch, run.best.validation
    for module in (run.model, run.judge):
        to_layout(module.eval().cpu(), torch.contiguous_format)
    return TrainingResult(run.model, run.judge, run.step, finished, epoch, run.minutes, validation)


def _step_of(run: Run, images: ImageSet, settings: Settings) -> Step:
    """A step on the images of these numbers [B], of which each process takes its share."""
    recipe, processes = settings.recipe, run.processes

    def step(chosen: Tensor, number: int) -> Losses:
        batch = augment(images.batch(chosen), recipe.shift, recipe.scale)
        if processes.count > 1:
            batch = processes.share(batch)
            torch.manual_seed(_step_seed(settings.seed - processes.rank - 1, number))  # of masks
        return run.trainer.step(batch.to(memory_format=run.layout), number)

    return StepGraphs(step, lambda number: number % recipe.n_critic == 0) if run.graphs else step


def _end_epoch(
    run: Run,
    epoch: int,
    validation_set: ImageSet | None,
    out: Path,
    settings: Settings,
    log: Callable[[int, dict[str, float]], None],
    observe: Observe,
) -> dict[str, float] | None:
    """Log the epoch's losses; every few epochs validate and save. Returns AUROCs, if made."""
    losses = {f"loss/{name}": value for name, value in run.means(everywhere=True).items()}
    log(run.step, losses | {"time/minutes": run.minutes})
    last = epoch == settings.recipe.epochs - 1
    if (epoch + 1) % settings.recipe.validate_every and not last:
        return None
    validation = None
    labels = set() if validation_set is None else set(validation_set.labels.tolist())
    if validation_set is not None and len(labels) == 2 and run.processes.is_main:
        validation = validate(run.model, run.judge, validation_set, settings.precision)
        run.validation = validation
        if settings.recipe.keep == "best":
            run.keep_if_best(epoch + 1)
        log(run.step, {f"validation/{name}": value for name, value in validation.items()})
        if run.average is not None:  # to be seen beside it
            live = validate(run.model, run.discriminator, validation_set, settings.precision)
            log(run.step, {f"unaveraged/{name}": value for name, value in live.items()})
    if run.processes.is_main:
        log(run.step, observe(run.model, epoch))
    run.save(settings, out)
    return validation


def validate(
    model: SQUID, discriminator: Discriminator, images: ImageSet, precision: Precision
) -> dict[str, float]:
    """AUROC by name of the scores that need no calibration; both modules go on training."""
    device = next(model.parameters()).device
    scorer = Scorer(model, discriminator, precision=precision, device=device)
    raw = scorer.raw_scores(images, [name for name in SCORES if name != "patch_error"])
    return {
        f"auroc_{name}": image_auroc(images.labels.numpy(), SCORES[name][0] * values.numpy())
        for name, values in raw.items()
    }


def _check_images(model: SQUID, images: ImageSet, recipe: Recipe) -> None:
    if images.images.shape[-1] != model.image_size:
        raise ValueError(
            f"the images are {images.images.shape[-1]} pixels wide; the model takes "
            f"{model.image_size}."
        )
    if len(images) < recipe.batch_size:
        raise ValueError(
            f"there are {len(images)} training images, fewer than a batch of {recipe.batch_size}; "
            "a smaller --batch-size would fit."
        )


def _step_seed(seed: int, step: int) -> int:
    """A seed of its own for every (seed, step)."""
    return (seed * 0x9E3779B97F4A7C15 + step) % 2**63


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(_step_seed(seed + 1, epoch))
