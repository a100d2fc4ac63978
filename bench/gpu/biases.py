"""What biases in float32 give to cuDNN's convolutions, if cuDNN takes them beside maps in bf16.

Of all roundings, that of the folded biases moves scores most (``bench accuracy rounding``). It has
a process of its own, since PyTorch would use a plan of cuDNN that was made for biases in bf16.
"""

from __future__ import annotations

from unittest.mock import patch

import torch

from squid_fast.inference import stages
from squid_fast.inference.convolution import FoldedConv
from squid_fast.utils.tf32 import tf32

from .levers import Levers
from .trials import Trials


def cast(
    conv: FoldedConv, dtype: torch.dtype, layout: torch.memory_format, onednn: bool
) -> FoldedConv:
    """``convolution.cast``, but for the bias."""
    weight = conv.weight.to(dtype, memory_format=layout)
    return FoldedConv(weight, conv.bias, conv.stride, conv.padding)


def make(run: Trials) -> None:
    """Make the trials."""
    with tf32(False):
        levers = Levers(run)
        with patch.object(stages, "cast", cast):
            net = levers.network()
        run.attempt("biases in float32: ms and images/s by batch", levers.rates, net)
        run.attempt("biases in float32: rank correlation, noise", levers.noise, net)
