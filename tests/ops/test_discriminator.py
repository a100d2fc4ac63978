"""The discriminator's score as an operation, against the formula in float64."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from squid_fast import ops
from tests.ops.samples import (
    DTYPES,
    cast_parameters,
    discriminator_parameters,
    normal,
    plain_discriminator_score,
)
from tests.tolerances import TOLERANCES, assert_close

norms = pytest.mark.parametrize("norm", [True, False], ids=["norm", "bias"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 9, 9), (3, 1, 19, 31), (0, 1, 9, 6)], ids=str)
@norms
def test_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype, norm: bool) -> None:
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    images = normal(*shape).to(dtype)
    parameters = discriminator_parameters((3, 5, 2), *shape[2:], norm)
    scores = ops.discriminator_score(images, **cast_parameters(parameters, lambda x: x.to(exact)))
    assert scores.dtype == exact
    expected = plain_discriminator_score(images.double(), **parameters)
    assert_close(scores, expected, TOLERANCES[exact], floor=float(parameters["regressor"].norm()))


@norms
def test_compiled_equals_eager(norm: bool) -> None:
    torch.compiler.reset()
    parameters = cast_parameters(discriminator_parameters((2, 3), 7, 9, norm), Tensor.float)
    images = normal(2, 1, 7, 9).float()

    def score(x: Tensor) -> Tensor:
        return ops.discriminator_score(2 * x, **parameters)

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), score(images))


def test_packed_weights_hold_22_bits() -> None:
    weights = [normal(4, 1, 5, 5), normal(6, 4, 5, 5, seed=1), normal(3, 6, 5, 5, seed=2)]
    weights[1][0] *= 1e-12
    weights[1][1] = 0
    weights[1][2] *= 1e12
    first, *layers, regressor = ops.pack_discriminator([w.float() for w in weights], normal(12))
    assert torch.equal(first, weights[0].float().view(4, 25).T)
    assert torch.equal(regressor, normal(12).view(3, 4).T)
    for weight, parts, power in zip(weights[1:], layers[::2], layers[1::2], strict=True):
        assert parts.dtype == torch.float16
        rows = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
        error = (parts.double().sum(0) * power - rows).abs().amax(0)
        assert (error <= 2**-22 * rows.abs().amax(0)).all()
        assert torch.equal(power.log2(), power.log2().round())


Z = torch.zeros
IMAGES, WEIGHTS, BIASES = Z(1, 1, 5, 5), [Z(2, 1, 5, 5), Z(3, 2, 5, 5)], [Z(2), Z(3)]
REST = (Z(12), Z(1))
ERRORS: dict[str, Callable[[], Tensor]] = {
    "images is torch.uint8; a floating-point dtype is needed.": (
        lambda: ops.discriminator_score(IMAGES.byte(), WEIGHTS, BIASES, *REST)
    ),
    "images is [1, 2, 5, 5]; [B, 1, H, W] would fit.": (
        lambda: ops.discriminator_score(Z(1, 2, 5, 5), WEIGHTS, BIASES, *REST)
    ),
    "there are 2 weights and 1 biases; as many of both are needed, two at least.": (
        lambda: ops.discriminator_score(IMAGES, WEIGHTS, BIASES[:1], *REST)
    ),
    "there are 2 scales; none or 1, one for each convolution but the first, would fit.": (
        lambda: ops.discriminator_score(IMAGES, WEIGHTS, BIASES, *REST, scales=BIASES)
    ),
    "weights are [3, 2, 5, 5], [2, 1, 5, 5]; [Cout, Cin, 5, 5] with 1, then the Cout before": (
        lambda: ops.discriminator_score(IMAGES, WEIGHTS[::-1], BIASES[::-1], *REST)
    ),
    "a bias or scale is [2] behind weights [3, 2, 5, 5]; [3] would fit.": (
        lambda: ops.discriminator_score(IMAGES, WEIGHTS, BIASES, *REST, scales=[Z(2)])
    ),
    "regressor is [12], but the last map is [3, 1, 1]; [3] would fit.": (
        lambda: ops.discriminator_score(IMAGES[..., :3, :3], WEIGHTS, BIASES, *REST)
    ),
    "images is [1, 1, 4, 4], whose last map is a single pixel, which has no statistics": (
        lambda: ops.discriminator_score(
            IMAGES[..., :4, :4], WEIGHTS, BIASES, Z(3), Z(1), scales=[Z(3)]
        )
    ),
    "images or parameters require a gradient, which this score does not have": (
        lambda: ops.discriminator_score(IMAGES.clone().requires_grad_(), WEIGHTS, BIASES, *REST)
    ),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_name_the_value(sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ERRORS[sentence]()
