"""Description of the machine and the versions that a measurement was made with."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from pathlib import Path

import torch

from .._version import __version__
from .threads import waiting


def describe(device: torch.device) -> dict[str, str | int | None]:
    """Describe device, threads, versions and date, ready for JSON.

    ``instructions`` is the instruction set that PyTorch uses on the CPU, which the environment may
    limit; ``waiting`` says how threads wait for one another.

    >>> describe(torch.device("cpu"))["torch"] == torch.__version__
    True
    """
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "device": device_name(device), "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "waiting": waiting(), "squid_fast": __version__,
        "torch": torch.__version__, "triton": triton, "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    """Name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
