"""The training loop: epochs, validation, checkpoints, interruption and resumption.

Lightning Fabric carries device and precision; the loop is ours because it shares one generator
forward between two losses and must be able to stop and go on between any two steps. All
randomness of a step is a function of (seed, step), so a resumed run draws what an uninterrupted
one would have drawn and no generator state has to be kept.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..data import ImageSet
from ..inference import Scorer
from ..inference.scores import SCORES
from ..metrics import image_auroc
from ..modules import SQUID, Discriminator
from ..presets import Recipe
from ..utils.devices import Precision, choose_device, choose_precision, to_layout
from ..utils.threads import WORTH_TIMING, fastest_threads, threads
from .augment import augment
from .checkpoint import CheckpointError, load_checkpoint
from .distributed import Processes
from .graphs import Losses, Step, StepGraphs
from .logs import LogKind, NoLogger, make_logger
from .state import CHECKPOINT, Run, Settings
from .step import set_learning_rate

_TIMED_AGAIN = 60.0  # seconds after which threads are, in a run by the clock: other work may come

Observe = Callable[[SQUID, int], dict[str, float]]


@dataclass(frozen=True)
class Progress:
    """What a reporter is told after every step, and after every validation.

    Attributes:
        epoch: counted from 0.
        epochs: of the run; None where the clock ends it.
        step: so many are done.
        share: of the run that is over, 1 at its end.
        losses: the means of this epoch so far, weighted as in the recipe.
        validation: AUROCs by name, when this step ended with a validation.
    """

    epoch: int
    epochs: int | None
    step: int
    share: float
    losses: Callable[[], dict[str, float]]
    validation: dict[str, float] | None = None


@dataclass
class TrainingResult:
    """The trained pair, on the CPU in evaluation mode, and how the run went.

    With ``recipe.averaging`` the discriminator is the averaged one. A finished run whose recipe
    keeps the best gives that pair and its validation, on rank 0; elsewhere and before the end it is
    the last. ``epoch`` is the pair's, counted from 1; ``minutes`` are all that the run took, before
    a resumption too; ``threads`` are those that PyTorch computed with.
    """

    model: SQUID
    discriminator: Discriminator
    step: int
    finished: bool
    epoch: int
    minutes: float
    threads: int
    validation: dict[str, float] = field(default_factory=dict)


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
        out: run folder; gets ``checkpoint.pt`` and the logs.
        recipe: weights, rates, epochs.
        validation_set: labelled images; with both classes their AUROC is computed every
            ``recipe.validate_every`` epochs.
        seconds: end by the clock, after so many, instead of after ``recipe.epochs``. The learning
            rate falls with the time that is left as it would with the epochs, and ``should_stop``
            ends the run as if its time were up.
        seed: of the discriminator's weights and of everything drawn in training.
        device, precision: see ``squid_fast.utils.devices``.
        thread_count: of PyTorch, on a CPU. Unless given, that of the run that is resumed, else of
            PyTorch's own number, its half and so on the one with which a few steps took the least
            time; by the clock, timed anew now and then. With the same number a run with the same
            seed has the same bits.
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
    """
    processes = Processes.from_environment()
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
            pace = _Pace(run, train_set, settings, thread_count, seconds is not None)
            with threads(thread_count or run.threads or torch.get_num_threads()):
                return _loop(
                    run, train_set, validation_set, out, settings, seconds, pace, logger.log,
                    report, should_stop, observe,
                )  # fmt: skip
    finally:
        logger.close()
        run.close()


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The generator's cosine schedule: ``lr`` at epoch 0, ``lr_floor * lr`` at ``t_max``.

    Past ``t_max`` it rises again, as the published schedule does.
    """
    cosine = (1 + math.cos(math.pi * epoch / recipe.t_max)) / 2
    return recipe.lr * (recipe.lr_floor + (1 - recipe.lr_floor) * cosine)


class _Pace:
    """Chooses the number of threads of a run by timing steps of a copy, where there is a choice.

    Once, and not where a run is resumed, so that its bits are those of a run that was not stopped;
    of a run by the clock now and then.
    """

    def __init__(
        self, run: Run, images: ImageSet, settings: Settings, given: int | None, by_clock: bool
    ) -> None:
        self._run, self._images, self._settings = run, images, settings
        self._most, self._by_clock = torch.get_num_threads(), by_clock
        steps = settings.recipe.epochs * (len(images) // settings.recipe.batch_size)
        alone_on_cpu = run.fabric.device.type == "cpu" and run.processes.count == 1
        worth_it = self._most > 1 and (by_clock or steps >= WORTH_TIMING)
        open_to_choice = alone_on_cpu and not given and run.threads is None
        self._next = -math.inf if worth_it and open_to_choice else math.inf

    def keep(self) -> None:
        """Time steps and set the number of threads, if it is time to; before a step."""
        if time.monotonic() < self._next:
            return
        recipe, fabric = self._settings.recipe, self._run.fabric
        model = copy.deepcopy(self._run.model)
        spare = Run(model, self._settings, fabric.device, fabric=fabric)
        step, batch = _step_of(spare, self._images, self._settings), torch.arange(recipe.batch_size)

        def turn() -> None:
            for number in range(recipe.n_critic):
                step(batch, number)

        torch.set_num_threads(fastest_threads(turn, self._most))
        self._next = time.monotonic() + _TIMED_AGAIN if self._by_clock else math.inf


def _loop(
    run: Run,
    train_set: ImageSet,
    validation_set: ImageSet | None,
    out: Path,
    settings: Settings,
    seconds: float | None,
    pace: _Pace,
    log: Callable[[int, dict[str, float]], None],
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    observe: Observe,
) -> TrainingResult:
    recipe, device = settings.recipe, run.fabric.device
    images = train_set.to(device)
    per_epoch = len(images) // recipe.batch_size
    steps = recipe.epochs * per_epoch

    def over() -> float:
        """The share of the run that is over."""
        return run.step / steps if seconds is None else min(60 * run.minutes / seconds, 1.0)

    def end_epoch(epoch: int, last: bool) -> dict[str, float] | None:
        return _end_epoch(run, epoch, last, validation_set, out, settings, log, observe)

    step = _step_of(run, images, settings)
    if run.to_validate:  # what a run died in
        end_epoch(run.step // per_epoch - 1, over() >= 1)
    stopped = ended = over() >= 1
    while not (stopped or ended):
        epoch, first = divmod(run.step, per_epoch)
        if first == 0:
            run.sums = {}
        order = torch.randperm(len(images), generator=_generator(settings.seed, epoch))
        for index in range(first, per_epoch):
            pace.keep()
            if seconds is not None or index == first:
                position = epoch if seconds is None else over() * recipe.epochs
                set_learning_rate(run.optimizers[0], learning_rate(recipe, position))
            chosen = order[index * recipe.batch_size : (index + 1) * recipe.batch_size]
            torch.manual_seed(_step_seed(settings.seed, run.step))
            run.add(step(chosen.to(device), run.step))
            run.step += 1
            last = index == per_epoch - 1
            stopped = run.processes.agree(should_stop(), device, run.step, last)
            ended = over() >= 1 or (stopped and seconds is not None)
            validation = end_epoch(epoch, ended) if last or ended else None
            share = 1.0 if ended else over()
            epochs = recipe.epochs if seconds is None else None
            report(Progress(epoch, epochs, run.step, share, run.means, validation))
            if device.type == "cpu":
                run.means()  # waiting costs nothing there, and stops at the first NaN
            if stopped or ended:
                break
    run.save(settings, out)
    epoch, validation = math.ceil(run.step / per_epoch), dict(run.validation)
    if ended and run.best is not None:
        run.model.load_state_dict(run.best.generator)
        run.judge.load_state_dict(run.best.discriminator)
        epoch, validation = run.best.epoch, run.best.validation
    for module in (run.model, run.judge):
        to_layout(module.eval().cpu(), torch.contiguous_format)
    return TrainingResult(
        run.model,
        run.judge,
        run.step,
        ended,
        epoch,
        run.minutes,
        torch.get_num_threads(),
        validation,
    )


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
    last: bool,
    validation_set: ImageSet | None,
    out: Path,
    settings: Settings,
    log: Callable[[int, dict[str, float]], None],
    observe: Observe,
) -> dict[str, float] | None:
    """Log the epoch's losses; every few epochs validate and save. Returns AUROCs, if made."""
    if not run.to_validate:
        losses = {f"loss/{name}": value for name, value in run.means(everywhere=True).items()}
        log(run.step, losses | {"time/minutes": run.minutes})
        if (epoch + 1) % settings.recipe.validate_every and not last:
            return None
        if not (out / CHECKPOINT).exists():  # rather now than after a validation that may fail
            run.to_validate = True
            run.save(settings, out)
    figures: dict[str, float] = {}
    validation = None
    labels = set() if validation_set is None else set(validation_set.labels.tolist())
    if validation_set is not None and len(labels) == 2 and run.processes.is_main:
        validation = validate(run.model, run.judge, validation_set, settings.precision)
        run.validation = validation
        if settings.recipe.keep == "best":
            run.keep_if_best(epoch + 1)
        figures |= {f"validation/{name}": value for name, value in validation.items()}
        if run.average is not None:  # to be seen beside it
            live = validate(run.model, run.discriminator, validation_set, settings.precision)
            figures |= {f"unaveraged/{name}": value for name, value in live.items()}
    if run.processes.is_main:
        log(run.step, figures | observe(run.model, epoch))
    run.to_validate = False
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
