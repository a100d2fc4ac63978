"""A module's weights in bfloat16, all of them cast by one operation.

Autocast casts every weight on its own, and every gradient back: over 200 kernels in two steps of
the published pair, each of which takes a GPU longer to start than to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from ..modules import MemoryMatrix

# Their products run in half precision under autocast.
_PRODUCTS = (nn.Conv2d, nn.Linear, nn.MultiheadAttention, MemoryMatrix)


class HalfWeights(nn.Module):
    """Calls ``module`` with the weights of its products in bfloat16.

    Meant for autocast in bfloat16, which finds nothing left to cast in them: the results are its
    own to the bit. Parameters and their gradients stay in float32.

    >>> layer = nn.Linear(2, 1)
    >>> y = HalfWeights(layer)(torch.rand(3, 2, dtype=torch.bfloat16))
    >>> y.float().sum().backward()
    >>> y.dtype, layer.weight.grad.dtype
    (torch.bfloat16, torch.float32)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._names = [
            f"{prefix}.{name}" if prefix else name
            for prefix, part in module.named_modules()
            if isinstance(part, _PRODUCTS)
            for name, parameter in part.named_parameters(recurse=False)
            # A cancelled bias moves only the running mean, and that of the attention pads it too.
            if parameter.requires_grad and name != "in_proj_bias"
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = [self.module.get_parameter(name) for name in self._names]
        cast = dict(zip(self._names, _Cast.apply(*weights), strict=True))
        return functional_call(self.module, cast, args, kwargs)


class _Cast(torch.autograd.Function):
    """Tensors in bfloat16; their gradients in float32."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _to(torch.bfloat16, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_to(torch.float32, [grad for grad in grads if grad is not None]))
        return tuple(None if grad is None else next(cast) for grad in grads)


def _to(dtype: torch.dtype, tensors: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    cast = tuple(torch.empty_like(x, dtype=dtype) for x in tensors)
    if cast:
        torch._foreach_copy_(cast, tensors)
    return cast
