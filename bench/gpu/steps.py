"""Time, memory and kernels of training steps: the published loop and squid_fast, by batch size.

At the published batch also with each of our pieces replaced by what PyTorch has: every kernel that
serves the step, and the weights that are cast at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from squid_fast import SQUID, Discriminator
from squid_fast.experiments.benchmark import compare

from ..scoring import speed
from . import trials
from .levers import kernels_used, replaced

_PUBLISHED, _OURS = "published loop", "squid_fast.Trainer"


def compiled(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The constructor of a network that is compiled."""

    def construct(*arguments: Any, **options: Any) -> nn.Module:
        network = kind(*arguments, **options)
        network.compile(dynamic=False)
        return network

    return construct


def weights_cast_one_by_one() -> AbstractContextManager[Any]:
    """Autocast has to cast weights, in steps that are made inside."""
    return patch.object(speed, "HalfWeights", lambda module: module)


def make(run: trials.Trials) -> None:
    """Make the trials."""
    preset = trials.preset(run.rehearsal)

    def rate(name: str, batch: int, rounds: int = 10) -> dict[str, float]:
        """Images/s, milliseconds of two steps, and the peak of the memory in GiB."""
        if not run.rehearsal:
            torch.cuda.reset_peak_memory_stats()
        count, call = speed.training(preset, run.device, batch)[name]
        for _ in range(0 if run.rehearsal else 4):  # until the steps are captured
            call()
        times = compare({name: (count, call)}, 1 if run.rehearsal else rounds)[name]
        image = sorted(times)[len(times) // 2]
        found = {"images_per_second": round(1 / image, 1), "ms": round(1e3 * count * image, 2)}
        if not run.rehearsal:
            found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return found

    def kernels(batch: int) -> list[list[Any]]:
        call = speed.training(preset, run.device, batch)[_OURS][1]
        return trials.kernels(call, run.device)

    for batch in (2,) if run.rehearsal else (16, 64, 128, 256):
        run.attempt(f"squid_fast, batch {batch}", rate, _OURS, batch)
    of_both = {2: 1} if run.rehearsal else {128: 4, 16: 10}  # batch to rounds
    for batch, rounds in of_both.items():
        run.attempt(f"published, batch {batch}", rate, _PUBLISHED, batch, rounds)
    for batch in of_both:
        run.attempt(f"kernels of two steps, batch {batch}", kernels, batch)
    *_, published = of_both
    of_ours = partial(rate, _OURS, published)
    with weights_cast_one_by_one():
        run.attempt(f"weights cast one by one, batch {published}", of_ours)
    step = speed.training(preset, run.device, published)[_OURS][1]
    for name in kernels_used(step, run.rehearsal):
        with replaced([name]):
            run.attempt(f"without {name}, batch {published}", of_ours)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        run.attempt(f"cudnn.benchmark, batch {published}", of_ours)
    if not run.rehearsal:  # where compiling would take minutes
        with (
            weights_cast_one_by_one(),  # the compiler would take them for others at every step
            patch.object(speed, "SQUID", compiled(SQUID)),
            patch.object(speed, "Discriminator", compiled(Discriminator)),
        ):
            run.attempt("squid_fast, compiled, batch 16", of_ours)
