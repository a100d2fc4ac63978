"""What counts as equal: one table by dtype, applied relative to the largest entry expected."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding of one entry, times a handful of roundings on the way to it. Half precision is compared
# with a float64 result of the same rounded inputs.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference relative to the largest entry expected; infinite where NaN appears.

    ``floor`` is the least that the largest entry counts as.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return 0.0
    scale = expected.double().abs().max().clamp_min(max(floor, 1e-30))
    return float(((actual.double() - expected.double()).abs().max() / scale).nan_to_num(torch.inf))


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float | None = None, floor: float = 0.0
) -> None:
    """Equal shapes, and values to ``tolerance`` or, without one, to that of actual's dtype."""
    bound = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    found = error(actual.detach(), expected.detach(), floor)
    assert found <= bound, f"differs by {found:.2e} of the largest entry, allowed are {bound:.0e}"
