"""Inputs of a case and the contenders on them.

Inputs are random, but such that the slots which a lookup keeps stand clear of the others: else
half precision would pick other slots than float64 does, and rightly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from squid_fast import modules, ops, reference

from .cases import Case

KEEP = 0.95  # the published chance of a position to be in-painted
HEADS = 8
THRESHOLD = 2.0  # of hard shrinkage: between the logits of ``_logits`` that are kept and the others

Function = Callable[..., Tensor]


class WrongResultError(AssertionError):
    """A contender disagrees with the float64 reference, so its speed is of no interest."""


@dataclass
class Problem:
    """Inputs and functions of a case.

    Attributes:
        inputs: what every function is called with.
        learned: which of them want a gradient, besides the parameters of a module.
        reference, ours: functions or modules.
        fitted: given inputs and a result, the function that should have made it; None where that
            is the reference itself. For operations that draw at random.
    """

    inputs: list[Tensor]
    learned: list[int]
    reference: Function
    ours: Function
    fitted: Callable[[list[Tensor], Tensor], Function] | None = None

    def grad(self, result: Tensor) -> Tensor:
        """The gradient that a result is given: the same for all contenders."""
        generator = torch.Generator(result.device).manual_seed(1)
        shape = result.shape
        grad = torch.randn(shape, generator=generator, device=result.device).to(result)
        channels_last = result.dim() == 4 and result.stride(1) == 1
        return grad.contiguous(memory_format=torch.channels_last) if channels_last else grad

    def wanted(self, function: Function, inputs: list[Tensor]) -> list[Tensor]:
        parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
        return [inputs[i] for i in self.learned] + parameters


def _planted(query: Tensor, memory: Tensor, k: int) -> Tensor:
    """Queries near k of the slots [N, M, C]: logits from 9 downwards, the k-th clear of the others.

    Slots have length 1, so that a logit is the weight with which the slot was added.
    """
    B, N, _ = query.shape
    heights = torch.linspace(9, 6, k, device=query.device)
    heights[-1] = 2.0
    chosen = torch.rand(B, N, memory.shape[1], device=query.device).topk(k, dim=-1).indices
    for j in range(k):
        rows = memory[torch.arange(N, device=query.device), chosen[..., j]]
        query = query + heights[j] * rows
    return query


def _memory_lookup(case: Case, device: torch.device) -> Problem:
    s = dict(case.sizes)
    B, N, M, C, k = (s[name] for name in "BNMCk")
    memory = torch.nn.functional.normalize(torch.randn(N, M, C, device=device), dim=-1)
    query = _planted(torch.randn(B, N, C, device=device) / math.sqrt(C), memory, k)
    learned = [0, 1] if case.direction == "forward_backward_slots" else [0]
    return Problem(
        [query, memory],
        learned,
        lambda q, m: reference.memory_lookup(q, m, k),
        lambda q, m: ops.memory_lookup(q, m, k),
    )


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


def _logits(case: Case, device: torch.device) -> Tensor:
    """Logits [B, N, M] of which k stand clear of the others."""
    s = dict(case.sizes)
    B, N, M, k = (s[name] for name in "BNMk")
    logits = 0.3 * torch.randn(B, N, M, device=device)
    heights = torch.linspace(9, 6, k, device=device)
    heights[-1] = 3.0
    chosen = torch.rand_like(logits).topk(k, dim=-1).indices
    return logits.scatter_(-1, chosen, heights.expand(B, N, k))


def _gumbel_shrinkage(case: Case, device: torch.device) -> Problem:
    k = dict(case.sizes)["k"]
    return Problem(
        [_logits(case, device)],
        [0],
        lambda x: reference.gumbel_shrinkage(x, k),
        lambda x: ops.gumbel_shrinkage(x, k),
    )


def _hard_shrinkage(case: Case, device: torch.device) -> Problem:
    return Problem(
        [_logits(case, device)],
        [0],
        lambda x: reference.hard_shrinkage(x, THRESHOLD),
        lambda x: ops.hard_shrinkage(x, THRESHOLD),
    )


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.relu(scale[:, None, None] * x + shift[:, None, None])


def _fitted_shortcut(inputs: list[Tensor], result: Tensor) -> Function:
    """The masked shortcut with the draw that ``result`` shows, which has to be a likely one."""
    inpainted, shortcut, *parameters = inputs
    if parameters:
        inpainted = _affine(inpainted, *parameters)
    mask = (result - inpainted).abs().sum(1) <= (result - shortcut).abs().sum(1)
    count = mask.numel()
    deviation = abs(float(mask.double().mean()) - KEEP)
    if not deviation <= 6 * math.sqrt(KEEP * (1 - KEEP) / count):
        share = float(mask.double().mean())
        raise WrongResultError(f"{share:.3f} of {count} positions are in-painted, not {KEEP}")

    def function(x: Tensor, y: Tensor, *affine: Tensor) -> Tensor:
        x = _affine(x, *affine) if affine else x
        return reference.masked_shortcut(x, y, KEEP, mask[:, None])

    return function


def _masked_shortcut(case: Case, device: torch.device) -> Problem:
    s = dict(case.sizes)
    shape = (s["B"] * s["N"], s["C"], s["side"], s["side"])
    maps = [torch.randn(shape, device=device) for _ in range(2)]
    if s["layout"] == "channels_last":
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    if not s["affine"]:
        return Problem(
            maps,
            [0, 1],
            lambda x, y: reference.masked_shortcut(x, y, KEEP),
            lambda x, y: ops.masked_shortcut(x, y, KEEP),
            _fitted_shortcut,
        )
    C = s["C"]
    parameters = [torch.rand(C, device=device) + 0.5, torch.randn(C, device=device)]
    return Problem(
        maps + parameters,
        [0, 1, 2, 3],
        lambda x, y, a, b: reference.masked_shortcut(_affine(x, a, b), y, KEEP),
        lambda x, y, a, b: ops.masked_shortcut(x, y, KEEP, scale=a, shift=b),
        _fitted_shortcut,
    )


def _neighbourhood_attention(case: Case, device: torch.device) -> Problem:
    s = dict(case.sizes)
    shape = (s["B"], s["N"], s["C"])
    inputs = [torch.randn(shape, device=device) for _ in range(3)]
    inputs += [torch.randn(s["C"], device=device) for _ in range(2)]
    return Problem(
        inputs,
        [0, 1, 2, 3, 4],
        partial(reference.neighbourhood_attention, num_heads=HEADS),
        partial(ops.neighbourhood_attention, num_heads=HEADS),
    )


def _inpaint_block(case: Case, device: torch.device) -> Problem:
    """Both blocks with the same weights; positions are always in-painted, so results compare.

    The draw is made all the same. A few slots of each memory answer to the mean of all features.
    """
    s = dict(case.sizes)
    width, C, k = s["width"], s["C"], s["k"]
    side = math.isqrt(C // (width // 4))
    arguments = (width, s["M"], s["N"], C, k, 1.0)
    plain, ours = reference.InpaintBlock(*arguments), modules.InpaintBlock(*arguments)
    variance, mean_sum = 1 / 3, C * 0.4 / math.sqrt(3)  # of the features, and their sum
    plain.bottleneck_conv1[1].running_var.fill_(variance)
    heights = torch.linspace(9, 6, k)
    heights[-1] = 2.0
    for queue in plain.memory:
        queue.memMatrix[:k] += heights[:, None] / mean_sum
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
    "gumbel_shrinkage": _gumbel_shrinkage,
    "hard_shrinkage": _hard_shrinkage,
    "masked_shortcut": _masked_shortcut,
    "neighbourhood_attention": _neighbourhood_attention,
    "inpaint_block": _inpaint_block,
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
    wanted = made.wanted(_uncompiled(function), made.inputs)
    grad = made.grad(function(*made.inputs).detach())

    def both() -> list[Tensor]:
        result = function(*made.inputs)
        return [result.detach(), *torch.autograd.grad(result, wanted, grad)]

    return both


def _uncompiled(function: Function) -> Function:
    return getattr(function, "_orig_mod", function)
