"""Inputs of the operations, and their comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from squid_fast import ops
from tests.tolerances import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 3, 5, 7, 17, 33]
LAST = torch.channels_last


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor
) -> list[Tensor]:
    """The result and the gradients of all inputs for the upstream gradient ``grad``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    gradients = torch.autograd.grad(result, leaves, grad.to(result.dtype), allow_unused=True)
    zero = [torch.zeros_like(x) for x in leaves]
    return [result.detach(), *(z if g is None else g for g, z in zip(gradients, zero, strict=True))]


def compare(
    function: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    floor: float = 0.0,
) -> None:
    """Value and gradients of ``function`` in ``dtype`` against ``expected`` in float64.

    ``floor``: least magnitude that errors are held against, where terms of that size cancel.
    """
    rounded = [x.to(dtype) for x in inputs]
    wide = [x.double() for x in rounded]
    grad = normal(*expected(*wide).shape, seed=99).to(dtype)
    results = with_gradients(function, rounded, grad)
    for actual, value in zip(results, with_gradients(expected, wide, grad.double()), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, value, tolerance, floor)


def separated(*shape: int, seed: int = 0) -> Tensor:
    """Logits whose order survives rounding to half precision, in an order of their own per row."""
    *rows, M = shape
    steps = torch.linspace(-2, 2, M, dtype=torch.float64)
    order = normal(*rows, M, seed=seed).argsort(dim=-1)
    return steps[order]


def attention_inputs(B: int, P: int, C: int, scale: float = 1.0) -> list[Tensor]:
    tensors = [normal(B, P * P, C, scale=scale, seed=s) for s in range(3)]
    return tensors + [normal(C, seed=s) for s in (3, 4)]


def operator_samples() -> dict[str, list[tuple]]:
    """Arguments for each of the ten operators, some with gradients, some strided."""
    logits, grad = normal(3, 7).float(), normal(3, 7, seed=1).float()
    query, memory = normal(3, 2, 4).float(), normal(2, 5, 4, seed=1).float()
    a, b = normal(2, 3, 4, 4).float(), normal(2, 3, 4, 4, seed=1).float()
    seed = torch.tensor(3)
    scale, shift = normal(3, seed=2).float(), normal(3, seed=3).float()
    attention = [x.float() for x in attention_inputs(2, 2, 4)]

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    return {
        "gumbel_shrinkage": [
            (leaf(logits), 3),
            (logits[:, ::2], 2),
            (logits[:0], 1),
            (logits.T, 2),
        ],
        "gumbel_shrinkage_backward": [
            (grad, logits),
            (grad[:1].expand(3, 7), logits),
            (grad, logits.view(7, 3).T),
        ],
        "hard_shrinkage": [(leaf(logits), 0.3), (logits.T, 0.3)],
        "hard_shrinkage_backward": [(grad, logits, 0.3), (grad.T, logits.T, 0.3)],
        "memory_lookup": [
            (leaf(query), memory, None, "gumbel", 2, 0.0, True),
            (leaf(query), leaf(memory), None, "gumbel", 2, 0.0, False),
            (query, leaf(memory), None, "hard", 0, 0.1, True),
            (leaf(query), leaf(memory), None, "raw", 0, 0.0, True),
            (query.mT.contiguous().mT, memory, memory[..., :3], "gumbel", 2, 0.0, False),
            (query, memory, torch.cat([memory, memory], dim=2), "hard", 0, 0.1, True),
        ],
        "memory_lookup_backward": [
            (query, query, memory, scores, mode, 2, 0.1, wanted)
            for mode in ("gumbel", "hard", "raw")
            for wanted in (True, False)
            for scores in (query.new_empty(0), normal(2, 3, 5, seed=2).float())
        ],
        "masked_shortcut": [
            (leaf(a), leaf(b), 0.5, seed, None, None),
            (a.to(memory_format=LAST), b, 0.5, seed, None, None),
            (a.to(memory_format=LAST), b.to(memory_format=LAST), 0.5, seed, None, None),
            (leaf(a), leaf(b), 0.5, seed, leaf(scale), leaf(shift)),
            (a.to(memory_format=LAST), leaf(b), 0.5, seed, scale, leaf(shift)),
        ],
        "masked_shortcut_backward": [
            (a, None, 0.5, seed, None, None),
            (a.to(memory_format=LAST), None, 0.5, seed, None, None),
            (a, b, 0.5, seed, scale, shift),
            (a.to(memory_format=LAST), b, 0.5, seed, scale, shift),
        ],
        "neighbourhood_attention": [
            (*map(leaf, attention), 2),
            (attention[0].mT.contiguous().mT, *attention[1:], 2),
            (*attention, 4),  # heads of width 1
        ],
        "neighbourhood_attention_backward": [(attention[0], *attention, heads) for heads in (2, 4)],
    }


def compile_cases(
    device: str | torch.device = "cpu",
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    seed = torch.tensor(3, device=device)
    cases = {
        "gumbel": (lambda x: ops.gumbel_shrinkage(x, 3), [normal(5, 9)]),
        "hard": (lambda x: ops.hard_shrinkage(x, 0.3), [normal(5, 9)]),
        "lookup": (
            lambda q, m: ops.memory_lookup(q, m, 3),
            [normal(5, 2, 4), normal(2, 6, 4, seed=1)],
        ),
        "shortcut": (
            lambda a, b: ops.masked_shortcut(a, b, 0.5, seed),
            [normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)],
        ),
        "attention": (
            lambda *x: ops.neighbourhood_attention(*x, 2),
            attention_inputs(2, 2, 4),
        ),
    }
    return {name: (call, [x.to(device) for x in inputs]) for name, (call, inputs) in cases.items()}
