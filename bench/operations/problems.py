"""Inputs of a case and the contenders on them.

Inputs are random, but such that the slots which a lookup keeps stand clear of the others: else
half precision would pick other slots than float64 does, and rightly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from squid_fast import modules, ops, reference

from .cases import Case

KEEP = 0.95  # the published chance of a position to be in-painted
HEADS = 8
THRESHOLD = 2.0  # of hard shrinkage: between the logits that are kept and the others

Function = Callable[..., Tensor]


class WrongResultError(AssertionError):
    """A contender disagrees with the float64 reference, so its speed is of no interest."""


@dataclass
class Problem:
    """Inputs and functions, or modules, of a case."""

    inputs: list[Tensor]
    learned: list[int]  # the inputs that want a gradient, besides the parameters of a module
    reference: Function
    ours: Function
    # Of operations that draw at random: inputs and a result to the function that should have made
    # it. None where that is the reference itself.
    fitted: Callable[[list[Tensor], Tensor], Function] | None = None

    def grad(self, result: Tensor) -> Tensor:
        """The gradient that a result is given: the same for all contenders."""
        generator = torch.Generator(result.device).manual_seed(1)
        grad = torch.randn(result.shape, generator=generator, device=result.device).to(result)
        channels_last = result.dim() == 4 and result.stride(1) == 1
        return grad.contiguous(memory_format=torch.channels_last) if channels_last else grad

    def wanted(self, function: Function, inputs: list[Tensor]) -> list[Tensor]:
        """What a gradient is taken of: the learned inputs, and the parameters of a module."""
        parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
        return [inputs[i] for i in self.learned] + parameters


def _heights(k: int, last: float, device: torch.device | None = None) -> Tensor:
    """Logits of the slots that are kept: from 9 downwards, the k-th clear of the others."""
    heights = torch.linspace(9, 6, k, device=device)
    heights[-1] = last
    return heights


def _planted(query: Tensor, memory: Tensor, k: int) -> Tensor:
    """Queries near k of the slots [N, M, C]; these have length 1, so that a weight is a logit."""
    B, N, _ = query.shape
    heights = _heights(k, 2.0, query.device)
    chosen = torch.rand(B, N, memory.shape[1], device=query.device).topk(k, dim=-1).indices
    for j in range(k):
        rows = memory[torch.arange(N, device=query.device), chosen[..., j]]
        query = query + heights[j] * rows
    return query


def _functions(name: str, **arguments: Any) -> tuple[Function, Function]:
    """The function of that name in ``reference`` and in ``ops``, with these arguments bound."""
    return tuple(partial(getattr(module, name), **arguments) for module in (reference, ops))


def _memory_lookup(case: Case, device: torch.device) -> Problem:
    s = dict(case.sizes)
    B, N, M, C, k = (s[name] for name in "BNMCk")
    memory = torch.nn.functional.normalize(torch.randn(N, M, C, device=device), dim=-1)
    query = _planted(torch.randn(B, N, C, device=device) / math.sqrt(C), memory, k)
    learned = [0, 1] if case.direction == "forward_backward_slots" else [0]
    return Problem([query, memory], learned, *_functions("memory_lookup", top_k=k))


def _projected_lookup(case: Case, device: torch.device) -> Problem:
    """A lookup whose answers are made of projected slots, three times as wide, as in evaluation."""
    made = _memory_lookup(case, device)
    _, memory = made.inputs
    k = dict(case.sizes)["k"]
    N, M, C = memory.shape

    def plain(query: Tensor, memory: Tensor, values: Tensor) -> Tensor:
        logits = torch.einsum("bnc,nmc->bnm", query, memory)
        return torch.einsum("bnm,nmd->bnd", reference.gumbel_shrinkage(logits, k), values)

    made.inputs.append(torch.randn(N, M, 3 * C, device=device))
    made.reference = plain
    made.ours = lambda q, m, v: ops.memory_lookup(q, m, k, values=v)
    return made


def _window_lookup(case: Case, device: torch.device) -> Problem:
    """Windows of channels-last maps, and their slots in three parts that add up to float32."""
    s = dict(case.sizes)
    B, c, side, grid, M, k = s["B"] * s["N"], *(s[name] for name in ("c", "side", "grid", "M", "k"))
    N, C, cut = grid**2, c * (side // grid) ** 2, side // grid
    memory = torch.nn.functional.normalize(torch.randn(N, M, C, device=device), dim=-1)
    planted = _planted(torch.randn(B, N, C, device=device) / math.sqrt(C), memory, k)

    def turned(windows: Tensor) -> Tensor:
        """Windows [B, N, (row, column, channel)] as maps [B, c, side, side], channels-last."""
        x = windows.view(B, grid, grid, cut, cut, c).transpose(2, 3)
        return x.reshape(B, side, side, c).permute(0, 3, 1, 2)

    def plain(maps: Tensor, slots: Tensor) -> Tensor:
        x, parts = (z if z.dtype == torch.float64 else z.float() for z in (maps, slots))
        windows = x.permute(0, 2, 3, 1).view(B, grid, cut, grid, cut, c).transpose(2, 3)
        answer = reference.memory_lookup(windows.reshape(B, N, C), parts.sum(dim=0), k)
        return turned(answer).to(maps.dtype)

    def ours(maps: Tensor, slots: Tensor) -> Tensor:
        return ops.window_lookup(maps, slots, k, (grid, grid))

    return Problem([turned(planted), ops.split_slots(memory)], [], plain, ours)


def _shrinkage(case: Case, device: torch.device) -> Problem:
    """Logits [B, N, M] of which k stand clear of the others."""
    s = dict(case.sizes)
    B, N, M, k = (s[name] for name in "BNMk")
    logits = 0.3 * torch.randn(B, N, M, device=device)
    chosen = torch.rand_like(logits).topk(k, dim=-1).indices
    logits.scatter_(-1, chosen, _heights(k, 3.0, device).expand(B, N, k))
    how = {"threshold": THRESHOLD} if case.operation == "hard_shrinkage" else {"top_k": k}
    return Problem([logits], [0], *_functions(case.operation, **how))


def _shortcut(x: Tensor, y: Tensor, *affine: Tensor, mask: Tensor | None = None) -> Tensor:
    """The reference, behind an affine with its ReLU where parameters [C] are given."""
    if affine:
        scale, shift = affine
        x = torch.relu(scale[:, None, None] * x + shift[:, None, None])
    return reference.masked_shortcut(x, y, KEEP, mask)


def _fitted_shortcut(inputs: list[Tensor], result: Tensor) -> Function:
    """The masked shortcut with the draw that ``result`` shows, which has to be a likely one."""
    everywhere = torch.ones_like(result[:, :1], dtype=torch.bool)
    inpainted, shortcut = _shortcut(*inputs, mask=everywhere), inputs[1]
    mask = (result - inpainted).abs().sum(1) <= (result - shortcut).abs().sum(1)
    count, share = mask.numel(), float(mask.double().mean())
    if not abs(share - KEEP) <= 6 * math.sqrt(KEEP * (1 - KEEP) / count):
        raise WrongResultError(f"{share:.3f} of {count} positions are in-painted, not {KEEP}")
    return partial(_shortcut, mask=mask[:, None])


def _masked_shortcut(case: Case, device: torch.device) -> Problem:
    s = dict(case.sizes)
    C, shape = s["C"], (s["B"] * s["N"], s["C"], s["side"], s["side"])
    inputs = [torch.randn(shape, device=device) for _ in range(2)]
    if s["layout"] == "channels_last":
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    if s["affine"]:
        inputs += [torch.rand(C, device=device) + 0.5, torch.randn(C, device=device)]

    def ours(x: Tensor, y: Tensor, scale: Any = None, shift: Any = None) -> Tensor:
        return ops.masked_shortcut(x, y, KEEP, scale=scale, shift=shift)

    return Problem(inputs, list(range(len(inputs))), _shortcut, ours, _fitted_shortcut)


def _neighbourhood_attention(case: Case, device: torch.device) -> Problem:
    s = dict(case.sizes)
    inputs = [torch.randn(s["B"], s["N"], s["C"], device=device) for _ in range(3)]
    inputs += [torch.randn(s["C"], device=device) for _ in range(2)]
    functions = _functions("neighbourhood_attention", num_heads=HEADS)
    return Problem(inputs, list(range(5)), *functions)


def _inpaint_block(case: Case, device: torch.device) -> Problem:
    """Both blocks with the same weights; every position is in-painted, so that results compare.

    A few slots of each memory answer to the mean of all features.
    """
    s = dict(case.sizes)
    width, C, k = s["width"], s["C"], s["k"]
    side = math.isqrt(C // (width // 4))
    arguments = (width, s["M"], s["N"], C, k, 1.0)
    plain, ours = reference.InpaintBlock(*arguments), modules.InpaintBlock(*arguments)
    variance, mean_sum = 1 / 3, C * 0.4 / math.sqrt(3)  # of the features, and their sum
    plain.bottleneck_conv1[1].running_var.fill_(variance)
    for queue in plain.memory:
        queue.memMatrix[:k] += _heights(k, 2.0)[:, None] / mean_sum
    ours.load_state_dict(plain.state_dict())
    training = case.direction != "forward"
    for block in (plain, ours):
        block.to(device, getattr(torch, case.dtype)).train(training)
    if not training:
        ours.freeze()  # as the Scorer does
    x = torch.randn(s["B"] * s["N"], width, side, side, device=device)
    return Problem([x], [0], plain, ours)


BUILDERS = {
    "memory_lookup": _memory_lookup,
    "projected_lookup": _projected_lookup,
    "gumbel_shrinkage": _shrinkage,
    "hard_shrinkage": _shrinkage,
    "masked_shortcut": _masked_shortcut,
    "neighbourhood_attention": _neighbourhood_attention,
    "inpaint_block": _inpaint_block,
    "window_lookup": _window_lookup,
}


def problem(case: Case, device: torch.device) -> Problem:
    """Inputs and functions, the same for every contender and every run."""
    torch.manual_seed(20230617)
    made = BUILDERS[case.operation](case, device)
    dtype = getattr(torch, case.dtype)
    made.inputs = [x.to(dtype) for x in made.inputs]
    if case.direction != "forward":
        for i in made.learned:
            made.inputs[i].requires_grad_()
    return made


def function_of(made: Problem, contender: str) -> Function:
    """The contender's function on the inputs of a problem."""
    if contender == "compiled":
        # Compiled code is kept by code object, of which all cases share a few: without this, the
        # ninth case would silently run uncompiled.
        torch._dynamo.reset()
        return torch.compile(made.reference, fullgraph=True)  # type: ignore[return-value]
    return made.ours if contender == "squid_fast" else made.reference


def call_of(case: Case, made: Problem, function: Function) -> Callable[[], list[Tensor]]:
    """What is timed: a call without arguments that returns the result and the gradients."""
    if case.direction == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [function(*made.inputs)]

        return forward
    wanted = made.wanted(getattr(function, "_orig_mod", function), made.inputs)  # uncompiled
    grad = made.grad(function(*made.inputs).detach())

    def both() -> list[Tensor]:
        result = function(*made.inputs)
        return [result.detach(), *torch.autograd.grad(result, wanted, grad)]

    return both
