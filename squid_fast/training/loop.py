"""The training loop: epochs, validation, checkpoints, interruption and resumption.

The loop is not Lightning's because it must be able to stop and go on between any two steps. All
randomness of a step is a function of (seed, step), so a resumed run draws what an uninterrupted
one would have drawn and no generator state has to be kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..data import ImageSet
from ..presets import Recipe
from ..utils.tf32 import tf32
from ..utils.threads import WORTH_TIMING, fastest_threads, threads
from .augment import augment
from .graphs import Losses, Step, StepGraphs
from .learner import Learner, step_seed
from .state import Run, Settings
from .step import set_learning_rate

_TIMED_AGAIN = 60.0  # seconds until threads are timed again in a run by the clock


@dataclass(frozen=True)
class Progress:
    """How far a run is, as ``report`` is told after every step.

    Attributes:
        epoch, epochs: this one, counted from 0, and their number; None where the clock ends a run.
        step: number of steps that are done.
        share: share of the run that is over, 1 at its end.
        losses: returns the mean losses of this epoch so far, weighted as in the recipe.
        validation: AUROCs by name, if a validation followed the step.

    >>> progress = Progress(0, 2, step=5, share=0.25, losses=lambda: {"reconstruction": 0.5})
    >>> f"epoch {progress.epoch + 1}/{progress.epochs}: {progress.share:.0%}"
    'epoch 1/2: 25%'
    """

    epoch: int
    epochs: int | None
    step: int
    share: float
    losses: Callable[[], dict[str, float]]
    validation: dict[str, float] | None = None


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The generator's cosine schedule: ``lr`` at epoch 0, ``lr_floor * lr`` at ``t_max``.

    Past ``t_max`` it rises again, as the published schedule does.

    >>> recipe = Recipe(lr=1e-3, lr_floor=0.1, t_max=100)
    >>> [round(learning_rate(recipe, epoch), 6) for epoch in (0, 50, 100)]
    [0.001, 0.00055, 0.0001]
    """
    cosine = (1 + math.cos(math.pi * epoch / recipe.t_max)) / 2
    return recipe.lr * (recipe.lr_floor + (1 - recipe.lr_floor) * cosine)


def fit(
    run: Run,
    train_set: ImageSet,
    validation_set: ImageSet | None = None,
    *,
    thread_count: int | None,
    seconds: float | None = None,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    observe: Callable[[int], dict[str, float]] = lambda epoch: {},
) -> bool:
    """Train and save the run, with the arguments of ``train``; return whether it is over."""
    recipe, seed, learner = run.settings.recipe, run.settings.seed, run.learner
    device = learner.device
    images = train_set.to(device)
    per_epoch = len(images) // recipe.batch_size
    steps = recipe.epochs * per_epoch
    end_epoch = partial(_end_epoch, run, validation_set, observe)

    def over() -> float:
        """The share of the run that is over."""
        return run.step / steps if seconds is None else min(60 * run.minutes / seconds, 1.0)

    with (
        # The steps' seeds do not reach the caller. Unless told the GPUs, PyTorch warns of several.
        torch.random.fork_rng(range(torch.cuda.device_count())),
        threads(thread_count or run.threads or torch.get_num_threads()),
    ):
        chooser = _ThreadChooser(run, images, thread_count, seconds is not None)
        step = _step_of(learner, images, run.settings)
        if run.to_validate:  # the run failed in that validation
            end_epoch(run.step // per_epoch - 1, over() >= 1)
        stopped = ended = over() >= 1
        while not (stopped or ended):
            epoch, first = divmod(run.step, per_epoch)
            if first == 0:
                run.sums = {}
            generator = torch.Generator("cpu").manual_seed(learner.epoch_seed(seed, epoch))
            order = torch.randperm(len(images), generator=generator, device="cpu")
            for index in range(first, per_epoch):
                chooser.choose()
                if seconds is not None or index == first:
                    position = epoch if seconds is None else over() * recipe.epochs
                    set_learning_rate(learner.optimizers[0], learning_rate(recipe, position))
                batch = order[index * recipe.batch_size : (index + 1) * recipe.batch_size]
                torch.manual_seed(step_seed(seed, run.step))
                run.add(step(batch.to(device), run.step))
                run.step += 1
                last = index == per_epoch - 1
                stopped = learner.processes.agree(should_stop(), device, run.step, last)
                ended = over() >= 1 or (stopped and seconds is not None)
                validation = end_epoch(epoch, ended) if last or ended else None
                epochs = recipe.epochs if seconds is None else None
                share = 1.0 if ended else over()
                report(Progress(epoch, epochs, run.step, share, run.means, validation))
                if device.type == "cpu":
                    run.means()  # waiting costs nothing there, and stops at the first NaN
                if stopped or ended:
                    break
        run.save()
        run.epoch, run.threads = math.ceil(run.step / per_epoch), torch.get_num_threads()
    if ended:
        run.restore_best()
    return ended


def has_both_classes(images: ImageSet | None) -> bool:
    """Whether there are normal and anomalous images, so that they have an AUROC."""
    return images is not None and len(set(images.labels.tolist())) == 2


class _ThreadChooser:
    """Chooses the number of threads of a run by timing steps of a copy of its learner.

    It chooses once, and not for a resumed run, whose bits are so those of a run that was not
    stopped; for a run by the clock it chooses again every minute.
    """

    def __init__(self, run: Run, images: ImageSet, given: int | None, by_clock: bool) -> None:
        self._run, self._images, self._by_clock = run, images, by_clock
        self._most = torch.get_num_threads()
        recipe, learner = run.settings.recipe, run.learner
        steps = recipe.epochs * (len(images) // recipe.batch_size)
        alone_on_cpu = learner.device.type == "cpu" and learner.processes.count == 1
        worth_it = self._most > 1 and (by_clock or steps >= WORTH_TIMING)
        open_to_choice = alone_on_cpu and not given and run.threads is None
        self._next = -math.inf if worth_it and open_to_choice else math.inf

    def choose(self) -> None:
        """Before a step: time others and set the number of threads, if that is due."""
        if time.monotonic() < self._next:
            return
        recipe = self._run.settings.recipe
        step = _step_of(self._run.learner.copy(), self._images, self._run.settings)
        batch = torch.arange(recipe.batch_size, device="cpu")

        def turn() -> None:
            for number in range(recipe.n_critic):
                step(batch, number)

        torch.set_num_threads(fastest_threads(turn, self._most))
        self._next = time.monotonic() + _TIMED_AGAIN if self._by_clock else math.inf


def _step_of(learner: Learner, images: ImageSet, settings: Settings) -> Step:
    """A step on the images with given indices [B], of which each process takes its share."""
    recipe, processes = settings.recipe, learner.processes

    def step(chosen: Tensor, number: int) -> Losses:
        batch = augment(images.batch(chosen), recipe.shift, recipe.scale)
        if processes.count > 1:  # each draws masks of its own
            torch.manual_seed(step_seed(settings.seed - processes.rank - 1, number))
        with tf32(False):
            return learner.step(processes.share(batch), number)

    if not learner.graphs:
        return step
    return StepGraphs(step, lambda number: number % recipe.n_critic == 0)


def _end_epoch(
    run: Run,
    validation_set: ImageSet | None,
    observe: Callable[[int], dict[str, float]],
    epoch: int,
    last: bool,
) -> dict[str, float] | None:
    """Log the losses; every few epochs validate, save and return the AUROCs, if there are any."""
    if not run.to_validate:
        losses = {f"loss/{name}": value for name, value in run.means(everywhere=True).items()}
        run.log(losses | {"time/minutes": run.minutes})
        if (epoch + 1) % run.settings.recipe.validate_every and not last:
            return None
        if not run.checkpoint.exists():  # rather now than after a validation that may fail
            run.to_validate = True
            run.save()
    validation = None
    if run.is_main:
        figures: dict[str, float] = {}
        if validation_set is not None and has_both_classes(validation_set):
            found = run.learner.validate(validation_set)
            validation = found["validation"]
            run.validated(epoch + 1, validation)
            figures = {f"{of}/{k}": v for of, values in found.items() for k, v in values.items()}
        run.log(figures | observe(epoch))
    run.to_validate = False
    run.save()
    return validation
