"""Integer convolutions: weights and activations of 8 bits, sums of 32, on processors with VNNI.

Where the bytes lie is fixed beforehand, by ranges that calibration saw on normal images, so that
the score of an image depends on nothing but the image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..utils.devices import INT8_UNITS, cpu_has
from .convolution import FoldedConv, has_onednn

Range = tuple[float, float]
_SAMPLES = 4096  # values kept of a tensor that is seen


def has_int8() -> bool:
    """Whether the processor multiplies bytes (VNNI), without which 8 bits bring nothing."""
    known = hasattr(torch.ops.onednn, "qconv2d_pointwise")
    return has_onednn() and known and cpu_has(INT8_UNITS)


class Grid(NamedTuple):
    """Values that bytes stand for: q is ``(q - zero) * scale``."""

    scale: float
    zero: int

    @classmethod
    def over(cls, span: Range) -> Grid:
        """The finest grid over a range; it holds 0, which pads convolutions, exactly."""
        low, high = min(span[0], 0.0), max(span[1], 0.0)
        scale = max(high - low, 1e-12) / 255
        return cls(scale, round(-low / scale))

    def encode(self, x: Tensor) -> Tensor:
        """uint8 of the shape of x; what lies outside goes to the nearest end."""
        x = (x * (1 / self.scale)).add_(self.zero - 128).round_().clamp_(-128, 127)
        # By way of int8, to which PyTorch converts several times as fast as to uint8.
        return x.to(torch.int8).view(torch.uint8).bitwise_xor_(128)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values, in a float dtype."""
        return codes.to(dtype).sub_(self.zero).mul_(self.scale)


class RangeRecorder:
    """Watches the convolutions of a float network while it runs.

    Attributes:
        ends: smallest and largest value seen, of every convolution's output by its name, and of
            what it was given by ``name.input``; both include 0.
    """

    def __init__(self, network: nn.Module) -> None:
        self.ends: dict[str, Range] = {}
        self._samples: dict[str, list[Tensor]] = {}
        self._hooks: list[RemovableHandle] = []
        for name, module in network.named_modules():
            if isinstance(module, FoldedConv):
                self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        self._hooks += [
            module.register_forward_pre_hook(lambda _, args: self._see(f"{name}.input", args[0])),
            module.register_forward_hook(lambda _, args, output: self._see(name, output)),
        ]

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _see(self, name: str, x: Tensor) -> None:
        low, high = self.ends.get(name, (0.0, 0.0))
        self.ends[name] = min(low, float(x.amin())), max(high, float(x.amax()))
        flat = x.flatten()
        self._samples.setdefault(name, []).append(flat[:: flat.numel() // _SAMPLES + 1].float())

    def ranges(self) -> dict[str, Range]:
        """For each name the part of its range whose grid has the least squared error.

        A few far values would make the grid coarse for all the others; they are cut off where
        that costs less than it brings.
        """
        return {name: self._best(name) for name in self.ends}

    def _best(self, name: str) -> Range:
        values = torch.cat(self._samples[name])
        low, high = self.ends[name]
        shares = torch.linspace(0.1, 1, 37).tolist()
        grids = [Grid.over((low * share, high * share)) for share in shares]
        errors = [
            (g.decode(g.encode(values), torch.float32) - values).square().mean() for g in grids
        ]
        share = shares[int(torch.stack(errors).argmin())]
        return low * share, high * share


class QuantizedConv(nn.Module):
    """A ``FoldedConv`` in bytes.

    Args:
        conv: float32.
        source: grid of its input.
        target: grid of its output, or the float dtype that it gives instead.
        residual: grid of the residual, where the output is bytes.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor

    def __init__(
        self,
        conv: FoldedConv,
        source: Grid,
        target: Grid | torch.dtype,
        residual: Grid | None = None,
    ) -> None:
        super().__init__()
        self.source, self.target = source, target
        # A residual in floats is taken as it is.
        self.residual = residual if residual and isinstance(target, Grid) else Grid(1.0, 0)
        self.stride, self.padding = conv.stride, conv.padding
        scale = (conv.weight.abs().amax(dim=(1, 2, 3)) / 127).clamp_min(1e-12)
        codes = (conv.weight / scale[:, None, None, None]).round_().to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros_like(scale, dtype=torch.int64))
        self.register_buffer("bias", conv.bias)
        self._packed: Tensor | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Bytes in; the residual, bytes or floats as the output is, is overwritten."""
        where = self.stride, self.padding, [1, 1], 1
        if self._packed is None:  # in the layout that oneDNN wants for maps of this size
            self._packed = torch.ops.onednn.qconv_prepack(
                self.codes, self.scale, *self.source, *where, list(x.shape)
            )
        if isinstance(self.target, Grid):
            out = (*self.target, torch.uint8)
        else:
            out = (1.0, 0, self.target)
        weights = self._packed, self.scale, self.zero
        if residual is None:
            return torch.ops.onednn.qconv2d_pointwise(
                x, *self.source, *weights, self.bias, *where, *out, "relu", [], ""
            )
        return torch.ops.onednn.qconv2d_pointwise.binary(
            x, *self.source, *weights, residual, self.bias, *where, *out,
            *self.residual, "sum", 1.0, "relu", [], "",
        )  # fmt: skip
