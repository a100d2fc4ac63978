"""``torch.compile`` as the backend of a scorer, for what lies between our kernels."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from shutil import which
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_COMPILER = "inductor"
_MOST = 256  # programs of a function: one for each batch size and choice of scores


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function as one compiled program for each shape of its arguments.

    A function that would fall into several raises. The operations of squid_fast stay as they are,
    and so do CUDA graphs, which the program may be captured in.
    """
    program = torch.compile(function, backend=_COMPILER, fullgraph=True, dynamic=False)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with (
            torch._dynamo.config.patch(recompile_limit=_MOST, accumulated_recompile_limit=_MOST),
            warnings.catch_warnings(),
        ):
            # It recommends TF32, which ``utils.tf32`` has reasons against.
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
            return program(*args, **kwargs)

    return run


def lacking(device: torch.device) -> str | None:
    """What this machine lacks to compile for the device; None if it lacks nothing."""
    if device.type == "cuda":
        return None if find_spec("triton") else "Triton"
    name = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return None if which(name) else f"the C++ compiler {name!r}"
