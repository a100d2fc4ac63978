"""The interpreter that remembers computes and refuses what the published one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from squid_fast import ops
from tests.kernels import interpreter
from tests.kernels.devices import ON_GPU
from tests.ops.samples import compile_cases, normal, shortcut_of, with_gradients

pytestmark = pytest.mark.skipif(ON_GPU, reason="kernels are compiled")

CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = compile_cases() | {
    "lookup": (lambda *x: ops.memory_lookup(*x, 3), [normal(18, 2, 35), normal(2, 40, 35)]),
    "half": (
        lambda *x: ops.memory_lookup(*x, threshold=0.3),
        [normal(3, 1, 4).half(), normal(1, 5, 4).half()],
    ),
    "search": (lambda *x: ops.memory_lookup(*x, 3), [normal(1, 1, 5), normal(1, 520, 5)]),
    "shortcut": (
        shortcut_of(0.5, torch.tensor(3)),
        [normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), normal(3), normal(3, seed=1)],
    ),
}


@triton.jit
def _fill_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), 1.0)


def test_the_version_is_known() -> None:
    assert interpreter.replacements() or triton.__version__ != interpreter.VERSION


@pytest.mark.parametrize("name", CASES)
def test_same_bits(name: str) -> None:
    function, inputs = CASES[name]
    inputs = [x.float() if x.dtype == torch.float64 else x for x in inputs]
    grad = normal(*function(*inputs).shape, seed=9)
    quick = with_gradients(function, inputs, grad)
    with interpreter.remembering(False):
        slow = with_gradients(function, inputs, grad)
    for got, value in zip(quick, slow, strict=True):
        assert got.dtype == value.dtype
        assert torch.equal(got, value)


@pytest.mark.parametrize("on", [True, False])
def test_same_refusals(on: bool) -> None:
    with interpreter.remembering(on):
        x = torch.zeros(8)
        _fill_kernel[(1,)](x, 8)
        assert x.sum() == 8
        for _ in range(2):
            with pytest.raises(InterpreterError, match="must be a power of 2"):
                _fill_kernel[(1,)](x, 7)
        _fill_kernel[(1,)](2 * x, 4)


def test_the_language_is_left_as_it_was() -> None:
    add, load = tl.tensor.__add__, tl.load
    with interpreter.remembering(False):
        published = tl.tensor.__add__, tl.load
    with interpreter.remembering():
        ops.memory_lookup(*(x.float() for x in CASES["lookup"][1]), 3)
    assert (tl.tensor.__add__, tl.load) == published == (add, load)
