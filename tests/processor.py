"""Marks of tests that need instructions which not every processor has."""

from __future__ import annotations

import pytest
import torch

from squid_fast.inference.convolution import has_onednn
from squid_fast.inference.quantization import has_int8
from squid_fast.utils.devices import has_fast_bf16

HAS_BF16 = has_fast_bf16(torch.device("cpu"))

needs_onednn = pytest.mark.skipif(
    not has_onednn(), reason="oneDNN's fused convolutions cannot be called here"
)
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this processor does not compute in bfloat16")
needs_int8 = pytest.mark.skipif(not has_int8(), reason="this processor has no int8 products")
