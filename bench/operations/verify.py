"""Contenders compared with the reference in float64, since only correct ones are timed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cases import Case
from .problems import Problem, WrongResultError, several

# Of the root mean square. Wide enough for half precision as the eager contender computes it: logits
# of 9 are rounded to 0.03.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# Of the gradients of a whole block, in which a ReLU whose input is nearly zero may be open in one
# precision and shut in the other: one of n entries is an error of 1 / sqrt(n).
BLOCK_TOLERANCES = {"float32": 1e-2, "bfloat16": 2e-1}


def _size(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def verify(case: Case, made: Problem, call: Callable[[], list[Tensor]]) -> float:
    """The largest error of the call's results against the reference in float64.

    Errors are root mean squares relative to that of what was expected.

    Raises:
        WrongResultError: An error exceeds the tolerance of the dtype, or is not a number.
    """
    found = [x.detach().double() for x in call()]
    inputs = [x.detach().double() for x in made.inputs]
    function = made.fitted(inputs, found[0]) if made.fitted else made.reference
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).double()
    if case.direction == "forward":
        with torch.no_grad():
            expected = several(function(*inputs))
    else:
        for i in made.learned:
            inputs[i].requires_grad_()
        result = function(*inputs)
        wanted = made.wanted(function, inputs)
        grad = made.grad(found[0].to(getattr(torch, case.dtype))).double()
        expected = [result.detach(), *torch.autograd.grad(result, wanted, grad)]
    sizes = [_size(x) for x in expected]
    largest, worst = max(sizes[1:] or sizes), 0.0
    for index, (a, b, size) in enumerate(zip(found, expected, sizes, strict=True)):
        # Some gradients are zero, such as that of a bias in front of a batch norm.
        error = _size(a - b) / (size if size > 1e-9 * largest else largest)
        deep = index and case.operation == "inpaint_block"
        allowed = (BLOCK_TOLERANCES if deep else TOLERANCES)[case.dtype]
        if not error <= allowed:
            what = f"gradient {index}" if index else "result"
            raise WrongResultError(f"{what} is off by {error:.1e} of its size, not {allowed:.0e}")
        worst = max(worst, error)
    return worst
