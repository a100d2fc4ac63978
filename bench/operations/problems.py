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
import torch.nn.functional as F
from torch import Tensor, nn

from squid_fast import modules, ops, reference
from squid_fast.inference.discriminator import FrozenDiscriminator
from squid_fast.ops.convolution import cell_weights, resized_weights

from .cases import Case

KEEP = 0.95  # the published chance of a position to be in-painted
HEADS = 8
THRESHOLD = 2.0  # of hard shrinkage: between the logits that are kept and the others

Function = Callable[..., Any]  # to a tensor, or to several


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
        return [inputs[i] for i in self.learned] + [p for p in parameters if p.requires_grad]


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


def _queue_lookup(case: Case, device: torch.device) -> Problem:
    """The same from slots in three parts, as a GPU's bf16 scorer asks the in-painting's queue."""
    made = _projected_lookup(case, device)
    s, parts = dict(case.sizes), ops.split(made.inputs[1], 3)

    def ours(query: Tensor, memory: Tensor, values: Tensor) -> Tensor:
        maps = query[:, None].permute(0, 3, 1, 2)
        return ops.window_lookup(maps, parts, s["k"], (1, s["N"]), values)

    made.ours = ours
    return made


def _split_linear(case: Case, device: torch.device) -> Problem:
    """The weight is split beforehand, as a frozen network has it."""
    s = dict(case.sizes)
    T, S = s["T"], s["S"]
    x, bias = torch.randn(s["B"] * s["N"], T, device=device), torch.randn(S, device=device)
    weight = torch.randn(S, T, device=device) / math.sqrt(T)
    parts = ops.split(weight, 2)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.split_linear(x, parts, bias)

    return Problem([x, weight, bias], [], F.linear, ours)


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

    return Problem([turned(planted), ops.split(memory, 3)], [], plain, ours)


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


def _batch_norm(case: Case, device: torch.device) -> Problem:
    """Channels-last, with ReLU, parameters in float32, and running statistics that ours moves."""
    s = dict(case.sizes)
    C, shape = s["C"], (s["B"] * s["N"], s["C"], s["side"], s["side"])
    maps = [torch.randn(shape, device=device) for _ in range(1 + s["residual"])]
    if s["residual"]:  # no sum so near zero that half precision has another sign
        maps[1] += (maps[0] + maps[1]).sign()
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    weight, bias = torch.ones(C, device=device), torch.zeros(C, device=device)
    running = weight.clone(), weight.clone(), torch.tensor(0, device=device)

    def plain(x: Tensor, *residual: Tensor) -> Tensor:
        parameters = weight.to(x.dtype), bias.to(x.dtype)
        return reference.batch_norm(x, *parameters, *residual, negative_slope=0.0)

    def ours(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.batch_norm(x, weight, bias, *running, residual=residual, negative_slope=0.0)

    return Problem(maps, list(range(len(maps))), plain, ours)


def _upsample_concat(case: Case, device: torch.device) -> Problem:
    s = dict(case.sizes)
    maps, P, C, S, side = s["B"] * s["N"], s["P"], s["C"], s["S"], s["side"]
    shapes = [(maps * P * P, C, side, side)] + [(maps, S, 2 * P * side, 2 * P * side)] * bool(S)
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    return Problem(inputs, list(range(len(inputs))), *_functions("upsample_concat", num_patch=P))


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
    modules.freeze_cancelled_biases(ours)
    for own, other in zip(ours.parameters(), plain.parameters(), strict=True):
        other.requires_grad_(own.requires_grad)
    training = case.direction != "forward"
    for block in (plain, ours):
        block.to(device, getattr(torch, case.dtype)).train(training)
    if not training:
        ours.freeze()  # as the Scorer does
    x = torch.randn(s["B"] * s["N"], width, side, side, device=device)
    return Problem([x], [0], plain, ours)


class _Scored(nn.Module):
    """The reference's discriminator as a function of images to scores [B]."""

    def __init__(self, discriminator: reference.Discriminator, mode: str) -> None:
        super().__init__()
        self.discriminator, self.mode = discriminator, mode

    def forward(self, images: Tensor) -> Tensor:
        return reference.discriminator_logits(self.discriminator, images, self.mode)


def _discriminator_score(case: Case, device: torch.device) -> Problem:
    """The same weights in both, and running statistics of these images."""
    s = dict(case.sizes)
    images = torch.rand(s["B"], 1, s["side"], s["side"], device=device)
    size = modules.discriminator_size(s["side"])
    plain = reference.Discriminator(size).to(device)
    with torch.no_grad():
        plain(images)
    trained = modules.Discriminator(size)
    trained.load_state_dict(plain.state_dict())
    frozen = FrozenDiscriminator(trained.to(device).eval(), s["mode"], fused=True)
    return Problem([images], [], _Scored(plain.eval(), s["mode"]), frozen)


def _images(case: Case, device: torch.device) -> Tensor:
    s = dict(case.sizes)
    pixels = torch.randint(256, (s["B"], 1, s["side"], s["side"]), device=device)
    return pixels.to(torch.uint8) if s["images"] == "uint8" else pixels / 255


def _stem(case: Case, device: torch.device) -> Problem:
    """The maps are in the dtype of the case, images as its sizes say."""
    s, images = dict(case.sizes), _images(case, device)
    weight, bias = torch.randn(s["F"], 1, 3, 3, device=device), torch.randn(s["F"], device=device)

    def plain(weight: Tensor, bias: Tensor) -> Tensor:
        pixels = ops.common.as_floats(images, weight.dtype)
        patches = reference.blocks.to_patches(pixels, s["P"])
        return torch.relu(F.conv2d(patches, weight, bias, padding=1))

    def ours(weight: Tensor, bias: Tensor) -> Tensor:
        return ops.stem(images, weight, bias, s["P"], weight.dtype)

    return Problem([weight, bias], [], plain, ours)


def _reconstruct(case: Case, device: torch.device) -> Problem:
    """Maps of patches, channels-last, as the decoder leaves them to the end at the latest."""
    s, images = dict(case.sizes), _images(case, device)
    P, side, width = s["P"], s["side"] // s["P"], s["F"]
    x = torch.randn(s["B"] * P * P, width, side, side, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(1, width, 1, 1, device=device) / math.sqrt(width)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        recon = torch.sigmoid(F.conv2d(reference.blocks.to_image(x, P), weight, bias))
        squares = (recon - ops.common.as_floats(images, recon.dtype)).square()
        errors = reference.blocks.to_patches(squares, P).mean(dim=(1, 2, 3))
        return recon, errors.view(-1, P * P)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.reconstruct(x, weight, bias, images, P)

    return Problem([x, weight, torch.randn(1, device=device)], [], plain, ours)


def _cell_convolution(case: Case, device: torch.device) -> Problem:
    """Weights are rounded and laid out beforehand, as a frozen network has them."""
    s, dtype = dict(case.sizes), getattr(torch, case.dtype)
    B, C, D, side = (s[name] for name in ("B", "C", "D", "side"))
    weight = torch.randn(D, C, 3, 3, device=device) / math.sqrt(9 * C)
    bias = torch.randn(D, device=device)
    step, weights = (1, 2), cell_weights(weight).to(dtype)
    if s["resized"]:
        step, weights = (1, 1), resized_weights(weight, side, side).to(dtype)
    weight = weight.to(dtype)
    head = (
        (torch.randn(D, device=device) / math.sqrt(D), bias[:1]) if "head" in s["behind"] else None
    )
    shapes = [(B, C, side, side)] + [(B, D, side, side)] * ("residual" in s["behind"])
    maps = [torch.randn(shape, device=device) for shape in shapes]

    def plain(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if s["resized"]:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1)
        x = torch.relu(x if residual is None else x + residual)
        if head is None:
            return x
        x = x if x.dtype == torch.float64 else x.float()
        return torch.sigmoid(F.conv2d(x, head[0].to(x)[None, :, None, None], head[1].to(x)))

    def ours(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.cell_convolution(x, weights, bias, step, residual=residual, head=head)

    last = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    return Problem(last, [], plain, ours)


BUILDERS = {
    "discriminator_score": _discriminator_score,
    "memory_lookup": _memory_lookup,
    "projected_lookup": _projected_lookup,
    "queue_lookup": _queue_lookup,
    "split_linear": _split_linear,
    "gumbel_shrinkage": _shrinkage,
    "hard_shrinkage": _shrinkage,
    "masked_shortcut": _masked_shortcut,
    "neighbourhood_attention": _neighbourhood_attention,
    "batch_norm": _batch_norm,
    "upsample_concat": _upsample_concat,
    "inpaint_block": _inpaint_block,
    "stem": _stem,
    "reconstruct": _reconstruct,
    "cell_convolution": _cell_convolution,
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


def several(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """What a function returned, as a list."""
    return list(result) if isinstance(result, tuple) else [result]


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
                return several(function(*made.inputs))

        return forward
    wanted = made.wanted(getattr(function, "_orig_mod", function), made.inputs)  # uncompiled
    grad = made.grad(function(*made.inputs).detach())

    def both() -> list[Tensor]:
        result = function(*made.inputs)
        return [result.detach(), *torch.autograd.grad(result, wanted, grad)]

    return both
