"""What the tests of kernels try on a GPU, and what in Triton's interpreter."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

ON_GPU = torch.cuda.is_available()

# The interpreter's bfloat16 is not to be trusted.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU

# A GPU compiles anew for most drawn examples, a second or two each.
drawn = settings(
    max_examples=5 if ON_GPU else 30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
