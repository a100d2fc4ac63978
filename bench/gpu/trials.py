"""What the programs for a GPU share: trials one after the other, inputs, a list of kernels."""

from __future__ import annotations

import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from squid_fast import PRESETS
from squid_fast.presets import Preset
from squid_fast.utils.devices import choose_device

from ..measurements import Results

_LEAST_SECONDS = 5.0  # in which a trial may still be begun


class Trials:
    """Trials one after the other; every figure is written as soon as it is there.

    A trial that fails leaves its error in place of a figure, and the others go on.

    Args:
        name: Name of the program. Figures go to ``NAME_cuda.json`` or ``NAME_cpu.json``.
        options: With ``device``, ``output`` and ``seconds``.

    Attributes:
        rehearsal: Whether there is no GPU, so that figures mean nothing and sizes should be tiny.
        failures: Names of the trials that failed.
    """

    def __init__(self, name: str, options: Namespace) -> None:
        self.device = choose_device(options.device)
        self.rehearsal = self.device.type == "cpu"
        self.failures: list[str] = []
        self._results = Results(options.output / f"{name}_{self.device.type}.json", self.device)
        self._started, self._seconds = time.monotonic(), options.seconds

    def attempt(self, name: str, call: Callable[..., Any], *arguments: Any) -> None:
        """Make a trial, unless the time is up, and note what it returns."""
        if time.monotonic() - self._started > self._seconds - _LEAST_SECONDS:
            return self.note(name, "skipped: the time was up")
        try:
            self.note(name, call(*arguments))
        except Exception as error:  # whatever it is, the others go on
            traceback.print_exc()
            self.failures.append(name)
            self.note(name, f"failed: {type(error).__name__}: {str(error)[:400]}")
        if not self.rehearsal:
            torch.cuda.empty_cache()

    def note(self, name: str, figure: Any) -> None:
        """Write a figure into the file, and print it."""
        self._results.figures[name] = figure
        self._results.write()
        seconds = time.monotonic() - self._started
        print(f"{seconds:5.1f} s  {name}: {str(figure)[:1500]}", flush=True)


def images(count: int, size: int) -> Tensor:
    """Smooth random fields [count, 1, size, size] in [0, 1], 32 of which differ."""
    coarse = torch.rand(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    fields = nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return fields.repeat(-(-count // 32), 1, 1, 1)[:count]


def preset(rehearsal: bool) -> Preset:
    """The published preset for ZhangLab or, for a rehearsal, a tiny one."""
    small = PRESETS["small"]
    tiny = {"features_root": 8, "num_slots": 12, "memory_channel": 64}
    return replace(small, model=small.model | tiny) if rehearsal else PRESETS["zhanglab"]


def kernels(call: Callable[[], object], device: torch.device, most: int = 45) -> list[list[Any]]:
    """The kernels of a call that take longest: name, launches, and microseconds of all."""
    on_gpu = device.type == "cuda"
    for _ in range(3 if on_gpu else 0):
        call()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as record:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = [[e.key[:140], e.count, round(getattr(e, time_of), 1)] for e in record.key_averages()]
    return sorted(found, key=lambda row: -row[2])[:most]
