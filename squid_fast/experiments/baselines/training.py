"""Trains the baselines: networks by the loop that trains SQUID, shallow methods by fitting them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data import ImageSet
from ...inference.calibration import calibrate_scores, check_calibration
from ...metrics import image_auroc
from ...presets import Recipe
from ...training import Progress
from ...training.checkpoint import check_run_folder, prepare_folder
from ...training.graphs import Losses
from ...training.learner import Learner, step_seed
from ...training.loop import fit, has_both_classes
from ...training.run import check_context, check_sets
from ...training.state import Run, Settings, check_count
from ...utils.arguments import check_json, check_kind
from ...utils.devices import Precision, choose_device, choose_precision
from ...utils.extras import require
from ...utils.machine import describe
from ...utils.outputs import check_folder
from ...utils.seeds import check_seed, seeded
from ...utils.threads import check_threads
from .networks import AutoEncoder
from .scorer import METHODS, BaselineScorer, save_baseline
from .shallow import PixelMethod

RECIPE = Recipe(epochs=30, lr=1e-3, t_max=30, lr_floor=0.05)


@dataclass
class BaselineResult:
    """How the training of a baseline went, as ``TrainingResult`` for SQUID.

    Attributes:
        finished: whether the training came to its end; False where it was stopped before.
        step: number of steps that are done; 0 for shallow methods.
        validation: AUROC by the name of the score.

    >>> BaselineResult(finished=False, step=12)
    BaselineResult(finished=False, step=12, validation={})
    """

    finished: bool
    step: int
    validation: dict[str, float] = field(default_factory=dict)


class NetworkLearner(Learner):
    """The network of a baseline in training: one loss, one optimiser, one process."""

    def __init__(self, network: AutoEncoder, settings: Settings, device: torch.device) -> None:
        self.network, self.device = network.train().to(device), device
        self.modules = self.trained = {"generator": network}
        self.optimizer = torch.optim.Adam(network.parameters(), settings.recipe.lr, fused=True)
        self.optimizers = [self.optimizer]
        self._bf16 = settings.precision == "bf16"

    def step(self, images: Tensor, number: int) -> Losses:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            loss = self.network.loss(images)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def epoch_seed(self, seed: int, epoch: int) -> int:
        return step_seed(seed, -epoch - 1)  # as in earlier versions, whose runs can be resumed


def train_baseline(
    name: str,
    train_set: ImageSet,
    out: str | Path,
    *,
    recipe: Recipe = RECIPE,
    validation_set: ImageSet | None = None,
    false_positive_rate: float = 0.05,
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "auto",
    thread_count: int | None = None,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    about: Mapping[str, Any] | None = None,
) -> BaselineResult:
    """Train a method of ``METHODS`` and, once it is finished, write its bundle into ``out``.

    The arguments that are not described here are those of ``squid_fast.training.train``.

    Args:
        recipe: epochs, batch size, rate, schedule and augmentation; shallow methods need none.
        validation_set: its normal images give the threshold, both kinds the AUROC that is kept.
        false_positive_rate: share of normal images above the threshold.
        about: further facts that the bundle states about its training.

    Raises:
        ValueError: no such method, fewer images than a batch, too few normal ones for the rate, a
            number out of its range, or hardware that does not compute in bf16.
        CheckpointError: nothing to resume, or ``out`` already holds a run.
        NonFiniteLossError: the loss became NaN or infinite.

    >>> pixels = torch.randint(256, (4, 1, 48, 48), dtype=torch.uint8)
    >>> images = ImageSet(pixels, labels=torch.zeros(4).long(), paths=["a", "b", "c", "d"])
    >>> train_baseline("smoothness", images, Path("run"), false_positive_rate=0.25).finished
    True
    """
    out = Path(out)
    check_sets(train_set, validation_set, None)
    check_kind("recipe", recipe, Recipe)
    check_json("about", about or {})
    if name not in tuple(METHODS):
        raise ValueError(f"method is {name!r}; known are squid, {', '.join(METHODS)}.")
    kind = METHODS[name][0]
    if not issubclass(kind, PixelMethod):
        check_count(len(train_set), recipe.batch_size)
    normal = validation_set.normal if validation_set else None
    held_out = len(normal) if normal else 0
    check_calibration(len(train_set), held_out, false_positive_rate, most=None)
    check_seed(seed)
    check_threads(thread_count)
    if has_both_classes(validation_set):
        require("sklearn.metrics", "train")
    where = choose_device(device)
    check_context(where)
    chosen = choose_precision(precision, where)
    count = thread_count or torch.get_num_threads()
    started, side, step = time.perf_counter(), train_set.images.shape[-1], 0
    if issubclass(kind, PixelMethod):
        if not resume:  # there is no checkpoint to look for
            check_run_folder(out, resume)
        check_folder(out)
        method: PixelMethod | AutoEncoder = kind.fit(train_set)
    else:
        with seeded(seed), torch.device("cpu"):
            method = kind(image_size=side)
        config = {"method": name, **method.config}
        settings = Settings(config, recipe, seed, chosen, len(train_set), train_set.fingerprint)
        prepare_folder(out, resume)
        learner = NetworkLearner(method, settings, where)
        with closing(Run(learner, settings, out, resume=resume)) as run:
            finished = fit(
                run, train_set, thread_count=thread_count, report=report, should_stop=should_stop
            )
        step, count = run.step, run.threads or count
        if not finished:
            return BaselineResult(False, step)
    scorer = BaselineScorer(name, method, side, device=where)
    raw = scorer.raw_scores(train_set)
    scorer.calibration = calibrate_scores(scorer, raw, normal, false_positive_rate)
    validation = {}
    if validation_set is not None and has_both_classes(validation_set):
        found = scorer.raw_scores(validation_set)[scorer.score_name].numpy()
        area = image_auroc(validation_set.labels.numpy(), found)
        validation = {f"auroc_{scorer.score_name}": area}
    facts = {
        "method": name,
        "recipe": None if isinstance(method, PixelMethod) else asdict(recipe),
        "seed": seed, "training_images": len(train_set),
        "training_minutes": round((time.perf_counter() - started) / 60, 2),
        "validation": validation, "machine": describe(where) | {"threads": count}, **(about or {}),
    }  # fmt: skip
    save_baseline(scorer, out, facts)
    return BaselineResult(True, step, validation)
