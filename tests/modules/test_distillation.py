"""The loss by which the student's decoder follows the teacher's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from squid_fast.modules.distillation import distillation_loss

SHAPES = [(2, 3, 8, 8), (2, 5, 4, 4)]


def maps(dtype: torch.dtype, apart: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """The student's maps and the teacher's."""
    torch.manual_seed(0)
    student = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    teacher = [x + apart * torch.randn_like(x) for x in student]
    return tuple([x.to(dtype).requires_grad_() for x in side] for side in (student, teacher))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
@pytest.mark.parametrize("apart", [1.0, 1e-2, 0.0])
def test_value_and_gradients(dtype: torch.dtype, tolerance: float, apart: float) -> None:
    student, teacher = maps(dtype, apart)
    loss = distillation_loss(student, teacher)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (3 * loss).backward()
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        # The difference is rounded to the maps' dtype, as any result in it is.
        difference = (s - t).detach().double()
        expected += float(difference.square().mean())
        gradient = 6 * difference / difference.numel()
        for x, sign in ((s, 1), (t, -1)):
            assert x.grad is not None
            assert x.grad.dtype == dtype
            torch.testing.assert_close(
                x.grad.double(), sign * gradient, rtol=tolerance, atol=6e-8 * (dtype.itemsize == 2)
            )
    assert loss.item() == pytest.approx(expected, rel=max(tolerance / 100, 1e-6))


@pytest.mark.parametrize("detached", [0, 1])
def test_one_side_alone_can_learn(detached: int) -> None:
    sides = list(maps(torch.bfloat16))
    sides[detached] = [x.detach() for x in sides[detached]]
    distillation_loss(*sides).backward()
    assert all(x.grad is not None for x in sides[1 - detached])


class _Float32Maps(TorchDispatchMode):
    """Counts results in float32 that are as large as a map."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.count += result.dtype == torch.float32 and result.dim() == 4
        return result


def test_half_precision_writes_no_map_in_float32() -> None:
    student, teacher = maps(torch.bfloat16)
    with _Float32Maps() as seen, torch.autocast("cpu", torch.bfloat16):
        distillation_loss(student, teacher).backward()
    assert seen.count == 0


def test_as_many_maps_of_both() -> None:
    student, teacher = maps(torch.float32)
    with pytest.raises(ValueError, match="zip"):
        distillation_loss(student, teacher[:1])
