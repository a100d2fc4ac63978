from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules

import pytest
import torch

from squid_fast import kernels, ops

# Triton is published for Linux only.
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]

IMPLEMENTATIONS = [
    (module, name)
    for module in (import_module(f"{ops.__name__}.{m.name}") for m in iter_modules(ops.__path__))
    for name, value in vars(module).items()
    if name.endswith("_cpu") and value.__module__ == module.__name__
]
# Forward and backward of seven operations, statistics of one, and six that only score.
assert len(IMPLEMENTATIONS) == 21


@pytest.fixture(autouse=True)
def _only_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels serve the CPU too, and falling back to PyTorch is an error."""

    def refuse(*_: object) -> None:
        raise AssertionError("PyTorch was called where a kernel should serve")

    for module, name in IMPLEMENTATIONS:
        monkeypatch.setattr(module, name, refuse)
    with kernels.use("interpret"):
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``torch.empty`` returns is NaN, so that an entry no kernel writes is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _remembering_interpreter() -> Iterator[None]:
    """Triton's interpreter works nothing out twice: a third of the time, and the same bits."""
    from tests.kernels import interpreter  # not above, since it needs Triton

    with interpreter.remembering():
        yield


@pytest.fixture
def inexact_exponentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials worked out twice differ in their last place, as on a GPU they may."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled")
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    generator = np.random.default_rng(0)

    def create_exp(self: object, x: TensorHandle) -> TensorHandle:
        exact = np.exp(x.data)
        steps = generator.integers(-1, 2, exact.shape).astype(exact.dtype)
        return TensorHandle(exact + steps * np.spacing(exact), x.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_exp", create_exp)
