"""Quantized convolutions: int8 weights, uint8 maps and int32 sums, on processors with VNNI.

The ranges of the maps are fixed beforehand, by calibration on normal images, so that the score of
an image depends on nothing but the image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..utils.devices import INT8_UNITS, cpu_has
from .convolution import FoldedConv, PackedWeights, has_onednn

Range = tuple[float, float]
_SAMPLES = 4096  # values kept of an observed tensor


def has_int8() -> bool:
    """Whether the processor has int8 products (VNNI), without which int8 is not faster."""
    known = hasattr(torch.ops.onednn, "qconv2d_pointwise")
    return has_onednn() and known and cpu_has(INT8_UNITS)


class QuantParams(NamedTuple):
    """How a tensor is quantized to uint8: ``x = (q - zero_point) * scale``."""

    scale: float
    zero_point: int

    @classmethod
    def from_range(cls, low: float, high: float) -> QuantParams:
        """The smallest scale that covers a range; 0, which pads convolutions, stays exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max(high - low, 1e-12) / 255
        return cls(scale, round(-low / scale))

    def quantize(self, x: Tensor) -> Tensor:
        """uint8 of the shape of ``x``; values outside the range saturate."""
        x = (x * (1 / self.scale)).add_(self.zero_point - 128).round_().clamp_(-128, 127)
        # By way of int8, to which PyTorch converts several times as fast as to uint8.
        return x.to(torch.int8).view(torch.uint8).bitwise_xor_(128)

    def dequantize(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """The values that ``q`` stands for, in a float dtype."""
        return q.to(dtype).sub_(self.zero_point).mul_(self.scale)


class MinMaxObserver:
    """Records the ranges of a float network's convolutions while it runs.

    Attributes:
        min_max: smallest and largest value of every convolution's output by its name, and of its
            input by ``name.input``; both include 0.
    """

    def __init__(self, network: nn.Module) -> None:
        self.min_max: dict[str, Range] = {}
        self._samples: dict[str, list[Tensor]] = {}
        self._hooks: list[RemovableHandle] = []
        for name, module in network.named_modules():
            if isinstance(module, FoldedConv):
                self._hooks += [
                    module.register_forward_pre_hook(
                        lambda _, given, name=name: self._add(f"{name}.input", given[0])
                    ),
                    module.register_forward_hook(lambda _, x, y, name=name: self._add(name, y)),
                ]

    def close(self) -> None:
        """Stop observing."""
        for hook in self._hooks:
            hook.remove()

    def _add(self, name: str, x: Tensor) -> None:
        low, high = self.min_max.get(name, (0.0, 0.0))
        self.min_max[name] = min(low, float(x.amin())), max(high, float(x.amax()))
        flat = x.flatten()
        self._samples.setdefault(name, []).append(flat[:: flat.numel() // _SAMPLES + 1].float())

    def ranges(self) -> dict[str, Range]:
        """By name, the part of the range that has the least squared quantization error.

        A few large values would make the scale coarse for all others; they are clipped where that
        lowers the error.
        """
        shares, best = torch.linspace(0.1, 1, 37).tolist(), {}
        for name, (low, high) in self.min_max.items():
            values, errors = torch.cat(self._samples[name]), []
            for share in shares:
                params = QuantParams.from_range(low * share, high * share)
                found = params.dequantize(params.quantize(values), torch.float32)
                errors.append((found - values).square().mean())
            share = shares[int(torch.stack(errors).argmin())]
            best[name] = low * share, high * share
        return best


class QuantizedConv(PackedWeights):
    """A ``FoldedConv`` of int8 weights and uint8 maps.

    Args:
        conv: float32.
        source: parameters of the input.
        target: parameters of the output, or a float dtype to leave it unquantized.
        residual: parameters of the residual, where the output is quantized.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor

    def __init__(
        self,
        conv: FoldedConv,
        source: QuantParams,
        target: QuantParams | torch.dtype,
        residual: QuantParams | None = None,
    ) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.residual = QuantParams(1.0, 0)  # a float residual is added as it is
        if residual is not None and isinstance(target, QuantParams):
            self.residual = residual
        self.stride, self.padding = conv.stride, conv.padding
        scale = (conv.weight.abs().amax(dim=(1, 2, 3)) / 127).clamp_min(1e-12)
        codes = (conv.weight / scale[:, None, None, None]).round_().to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros_like(scale, dtype=torch.int64))
        self.register_buffer("bias", conv.bias)

    def pack(self, size: list[int]) -> Tensor:
        where = self.stride, self.padding, [1, 1], 1
        return torch.ops.onednn.qconv_prepack(self.codes, self.scale, *self.source, *where, size)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """uint8 maps to maps of the target; the residual, of the same kind, is overwritten."""
        where = self.stride, self.padding, [1, 1], 1
        if isinstance(self.target, QuantParams):
            out = (*self.target, torch.uint8)
        else:
            out = (1.0, 0, self.target)
        weights = self.packed(x), self.scale, self.zero
        if residual is None:
            return torch.ops.onednn.qconv2d_pointwise(
                x, *self.source, *weights, self.bias, *where, *out, "relu", [], ""
            )
        return torch.ops.onednn.qconv2d_pointwise.binary(
            x, *self.source, *weights, residual, self.bias, *where, *out,
            *self.residual, "sum", 1.0, "relu", [], "",
        )  # fmt: skip
