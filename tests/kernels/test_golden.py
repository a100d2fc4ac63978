"""The published implementation's own tensors through the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import squid_fast
from squid_fast import ops
from tests.kernels.devices import ON_GPU
from tests.modules import test_golden as golden_tests
from tests.modules.test_golden import Load, models
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(ON_GPU, reason="the golden tests run on the CPU")


@pytest.mark.parametrize("case", golden_tests.GUMBEL)
def test_gumbel_shrinkage(golden: Load, case: str) -> None:
    t = golden_tests.part(golden("ops")[1], f"gumbel.{case}.")
    logits = t["logits"].requires_grad_()
    weights = ops.gumbel_shrinkage(logits, int(t["k"]))
    assert torch.equal(weights > 1e-30, t["weights"] > 1e-30)
    # Probabilities one float32 step apart: (p - t) / (p - t + 1e-12) has lost four digits, and
    # another exponential function loses others.
    assert_close(weights, t["weights"], 1e-3 if case == "nearties" else None, floor=1e-6)
    # Another exponential function here too.
    golden_tests.assert_gradients(weights, t, tolerance=1e-4, logits=logits)


@pytest.mark.parametrize("test", [golden_tests.test_queue, golden_tests.test_matrix])
def test_memories(golden: Load, test: Callable) -> None:
    test(golden, squid_fast)


@models
def test_evaluation_of_a_published_checkpoint(golden: Load, name: str) -> None:
    golden_tests.test_evaluation(golden, name, squid_fast)


@models
def test_training_step_of_a_published_checkpoint(golden: Load, name: str) -> None:
    golden_tests.test_float32_training_step(golden, name)
