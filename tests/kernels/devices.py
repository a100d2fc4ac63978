"""What the tests of kernels try on a GPU, and what in Triton's interpreter."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

# The interpreter's bfloat16 is not to be trusted.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU

# A GPU compiles anew for most drawn examples, a second or two each.
drawn = settings(
    max_examples=5 if ON_GPU else 30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def tensors(inputs: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The inputs on the device on which kernels are tested."""
    return [x.to(DEVICE, dtype) for x in inputs]
