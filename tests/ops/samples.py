"""Inputs of the operations, and their comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from squid_fast import ops, reference
from tests.tolerances import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2**16)
up_to = partial(st.integers, 1)


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
    fast: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    *settings: Any,
    grad: Tensor | None = None,
    tolerance: float | None = None,
    floor: float = 0.0,
    **options: Any,
) -> list[Tensor]:
    """Value and gradients of ``fast``, which must be those of ``plain`` in float64.

    Settings and options follow the inputs, whose first has the shape of the result. ``floor`` is
    the least magnitude that errors are held against, where terms of that size cancel.
    """
    if grad is None:
        grad = normal(*inputs[0].shape, seed=99).to(inputs[0])
    actual = with_gradients(lambda *x: fast(*x, *settings, **options), inputs, grad)
    wide = [x.cpu().double() for x in (*inputs, grad)]
    expected = with_gradients(lambda *x: plain(*x, *settings, **options), wide[:-1], wide[-1])
    for got, value, given in zip(actual, expected, [inputs[0], *inputs], strict=True):
        assert got.dtype == given.dtype
        assert_close(got.cpu(), value, tolerance, floor)
    return actual


def assert_nan_stays_in_its_row(
    function: Callable[[Tensor], Tensor], x: Tensor, bad: float
) -> None:
    """One bad entry in the middle of ``x`` makes the answer of its row NaN and no other."""
    *row, entry = (size // 2 for size in x.shape)
    clean = function(x)
    x[(*row, entry)] = bad
    answer = function(x)
    assert answer[tuple(row)].isnan().all()
    answer[tuple(row)] = clean[tuple(row)]
    assert torch.equal(answer, clean)


# --- shrinkage and lookup -------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda base: base.T,
    "strided": lambda base: base[::2, 1::2],
    "expanded": lambda base: base[:1].expand(4, 10),
    "vector": lambda base: base[0],
}
"""What is tried of ``separated(6, 10)``."""


def separated(*shape: int, seed: int = 0) -> Tensor:
    """Logits whose order survives rounding to half precision, in an order of their own per row."""
    *rows, M = shape
    return torch.linspace(-2, 2, M).double()[normal(*rows, M, seed=seed).argsort(dim=-1)]


def some_k(M: int) -> list[int]:
    """Top-k's ends and some between them."""
    return sorted({1, 2, 5, M - 1, M} & set(range(1, min(M, 64) + 1)))


def tied(rows: int, M: int, levels: int, seed: int) -> Tensor:
    """Logits of few distinct values, so that the threshold is nearly always tied."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (rows, M), generator=generator).double()


def survivors(logits: Tensor, k: int) -> Tensor:
    """Top-k said without a search: what fewer than ``k`` entries equal or exceed."""
    return (logits[:, None, :] >= logits[:, :, None]).sum(dim=-1) < k


def exact_memories(N: int, C: int, scores: Tensor) -> list[Tensor]:
    """Two queries and slots whose first coordinate alone makes the scores, exact in every dtype."""
    M = len(scores)
    query, memory = torch.zeros(2, N, C).double(), (4 * normal(N, M, C)).round() / 8
    query[..., 0] = torch.tensor([0.5, 1.0]).view(2, 1)
    memory[..., 0] = scores
    return [query, memory]


def looked_up_values(query: Tensor, memory: Tensor, values: Tensor, **mode: Any) -> Tensor:
    """The reference's answer from slots that are longer by the values, which no query sees."""
    V = values.shape[-1]
    longer = torch.cat([query, query.new_zeros(*query.shape[:2], V)], dim=2)
    return reference.memory_lookup(longer, torch.cat([memory, values], dim=2), **mode)[..., -V:]


def window_maps(
    B: int, c: int, H: int, W: int, M: int, grid: tuple[int, int], seed: int = 0
) -> list[Tensor]:
    """Maps [B, c, H, W], exact in float16, and a memory [N, M, C] in float32; scores near one."""
    N, C = grid[0] * grid[1], c * H * W // (grid[0] * grid[1])
    maps = normal(B, c, H, W, seed=seed).half().double()
    return [maps, (2 * normal(N, M, C, seed=seed + 1) / C**0.5).float()]


def looked_up_windows(maps: Tensor, memory: Tensor, top_k: int, grid: tuple[int, int]) -> Tensor:
    """The reference's answers [B, c, H, W], window by window, cut out and laid flat."""
    (_, _, H, W), (rows, columns) = maps.shape, grid
    h, w, out = H // rows, W // columns, torch.empty_like(maps)
    for n in range(rows * columns):
        i, j = n // columns * h, n % columns * w
        window = maps[:, :, i : i + h, j : j + w].permute(0, 2, 3, 1)
        answer = reference.memory_lookup(window.flatten(1), memory[n], top_k)
        out[:, :, i : i + h, j : j + w] = answer.view(window.shape).permute(0, 3, 1, 2)
    return out


# --- masked shortcut ------------------------------------------------------------------------------


def blend(mask: Tensor, *maps: Tensor) -> Tensor:
    """The formula, of inpainted, shortcut and, where given, scale and shift."""
    inpainted, shortcut, *affine = maps
    if affine:
        scale, shift = (z[:, None, None] for z in affine)
        inpainted = (inpainted * scale + shift).relu()
    return torch.where(mask, inpainted, shortcut)


def shortcut_of(keep: float, seed: Tensor) -> Callable[..., Tensor]:
    """The operation as a function of the tensors that have a gradient."""

    def call(x: Tensor, y: Tensor, scale: Tensor | None = None, shift: Tensor | None = None):
        return ops.masked_shortcut(x, y, keep, seed, scale=scale, shift=shift)

    return call


def assert_backward_repeats_the_draw(affine: bool, device: str | torch.device) -> None:
    def full(*shape: int, value: float) -> Tensor:
        return torch.full(shape, value, device=device)

    maps = [full(2, 3, 16, 16, value=value).requires_grad_() for value in (1.0, 0.0)]
    # relu(2 * 1 - 1) is 1 again.
    scale, shift = (full(3, value=2.0), full(3, value=-1.0)) if affine else (None, None)
    out = ops.masked_shortcut(*maps, 0.5, scale=scale, shift=shift)
    ops.masked_shortcut(*maps, 0.5)  # another draw in between
    grad = normal(*out.shape).to(out)
    kept, passed = torch.autograd.grad(out, maps, grad)
    assert torch.equal(kept, (2 if affine else 1) * torch.where(out == 1, grad, 0.0))
    assert torch.equal(passed, torch.where(out == 1, 0.0, grad))


# --- attention ------------------------------------------------------------------------------------


def attention_inputs(B: int, P: int, C: int, scale: float = 1.0) -> list[Tensor]:
    tensors = [normal(B, P * P, C, scale=scale, seed=s) for s in range(3)]
    return tensors + [normal(C, seed=s) for s in (3, 4)]


def compare_attention(inputs: list[Tensor], heads: int, **how: Any) -> list[Tensor]:
    # The floor: with P = 1 the gradient of the query cancels.
    fast, plain = ops.neighbourhood_attention, reference.neighbourhood_attention
    return compare(fast, plain, inputs, heads, floor=1.0, **how)


# --- all operators --------------------------------------------------------------------------------


def operator_samples() -> dict[str, list[tuple]]:
    """Arguments for each of the eleven operators, some with gradients, some strided."""
    logits, grad = normal(3, 7).float(), normal(3, 7, seed=1).float()
    query, memory = normal(3, 2, 4).float(), normal(2, 5, 4, seed=1).float()
    a, b = normal(2, 3, 4, 4).float(), normal(2, 3, 4, 4, seed=1).float()
    seed = torch.tensor(3)
    scale, shift = normal(3, seed=2).float(), normal(3, seed=3).float()
    attention = [x.float() for x in attention_inputs(2, 2, 4)]

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    last = [x.to(memory_format=torch.channels_last) for x in (a, b)]
    strided = a.repeat(1, 1, 2, 3).to(memory_format=torch.channels_last)[:, :, ::2, ::3]
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
        "window_lookup": [
            (a.half(), normal(1, 4, 5, 12).half(), 3, 2, 2),
            (last[0].half(), normal(3, 2, 5, 24).half(), 3, 1, 2),
            (strided.half(), normal(3, 2, 5, 24).half(), 1, 2, 1),
        ],
        "masked_shortcut": [
            (leaf(a), leaf(b), 0.5, seed, None, None),
            (last[0], b, 0.5, seed, None, None),
            (*last, 0.5, seed, None, None),
            (leaf(a), leaf(b), 0.5, seed, leaf(scale), leaf(shift)),
            (last[0], leaf(b), 0.5, seed, scale, leaf(shift)),
            (leaf(last[0]), leaf(last[1]), 0.5, seed, scale, shift),
            (strided.requires_grad_(), leaf(b), 0.5, seed, scale, shift),
        ],
        "masked_shortcut_backward": [
            (a, None, 0.5, seed, None, None),
            (last[0], None, 0.5, seed, None, None),
            (a, b, 0.5, seed, scale, shift),
            (last[0], b, 0.5, seed, scale, shift),
            (*last, 0.5, seed, scale, shift),
            (strided.detach(), strided.detach(), 0.5, seed, scale, shift),
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
        "lookup": (lambda *x: ops.memory_lookup(*x, 3), [normal(5, 2, 4), normal(2, 6, 4, seed=1)]),
        "shortcut": (
            lambda *x: ops.masked_shortcut(*x, 0.5, seed),
            [normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)],
        ),
        "attention": (lambda *x: ops.neighbourhood_attention(*x, 2), attention_inputs(2, 2, 4)),
    }
    return {name: (call, [x.to(device) for x in inputs]) for name, (call, inputs) in cases.items()}


def assert_compiled_equals_eager(name: str, backend: str, device: str | torch.device) -> None:
    torch.compiler.reset()
    function, inputs = compile_cases(device)[name]
    inputs = [x.float() for x in inputs]
    grad = normal(*function(*inputs).shape, seed=9).to(inputs[0])
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = (with_gradients(f, inputs, grad) for f in (compiled, function))
    assert all(map(torch.equal, *results))
