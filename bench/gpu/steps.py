"""Time, memory and kernels of training steps: the published loop and squid_fast, by batch size."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from squid_fast import SQUID, Discriminator
from squid_fast.experiments.benchmark import compare

from ..scoring import speed
from . import trials

_PUBLISHED, _OURS = "published loop", "squid_fast.Trainer"


class CompiledSQUID(SQUID):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.compile(dynamic=False)


class CompiledDiscriminator(Discriminator):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.compile(dynamic=False)


def main() -> None:
    """Make the trials; exit with 1 if one failed."""
    run = trials.Trials("steps", trials.parse(__doc__))
    device = run.device

    def rate(name: str, batch: int, rounds: int = 10) -> dict[str, float]:
        """Images/s, milliseconds of two steps, and the peak of the memory in GiB."""
        if not run.rehearsal:
            torch.cuda.reset_peak_memory_stats()
        count, call = speed.training(device, batch)[name]
        for _ in range(0 if run.rehearsal else 4):  # until the steps are captured
            call()
        times = compare({name: (count, call)}, 1 if run.rehearsal else rounds)[name]
        image = sorted(times)[len(times) // 2]
        found = {"images_per_second": round(1 / image, 1), "ms": round(1e3 * count * image, 2)}
        if not run.rehearsal:
            found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return found

    def kernels(batch: int) -> list[list[Any]]:
        call = speed.training(device, batch)[_OURS][1]
        return trials.kernels(call, device)

    small, large = (2, 2) if run.rehearsal else (16, 128)
    with ExitStack() as stack:
        stack.enter_context(patch.object(speed, "PRESET", trials.preset(run.rehearsal)))
        for batch in (2,) if run.rehearsal else (16, 64, 128, 256):
            run.attempt(f"squid_fast, batch {batch}", lambda batch=batch: rate(_OURS, batch))
        for batch, rounds in {large: 4, small: 10}.items():
            run.attempt(
                f"published, batch {batch}",
                lambda batch=batch, rounds=rounds: rate(_PUBLISHED, batch, rounds),
            )
        for batch in dict.fromkeys((small, large)):
            run.attempt(f"kernels of two steps, batch {batch}", lambda batch=batch: kernels(batch))
        if not run.rehearsal:  # where compiling would take minutes
            stack.enter_context(patch.object(speed, "SQUID", CompiledSQUID))
            stack.enter_context(patch.object(speed, "Discriminator", CompiledDiscriminator))
            run.attempt("squid_fast, compiled, batch 16", lambda: rate(_OURS, 16))
    sys.exit(bool(run.failures))


if __name__ == "__main__":
    main()
