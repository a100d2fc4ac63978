"""The kernel against the resize and the convolution one after the other, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from squid_fast import kernels, ops
from squid_fast.inference.cells import CellConv
from squid_fast.inference.ends import Head
from squid_fast.inference.network import FrozenGenerator
from squid_fast.inference.stages import Stage
from squid_fast.kernels import convolution, dispatch
from squid_fast.modules.unet import DoubleConv, OutConv
from squid_fast.ops.convolution import cell_weights, resized_weights
from tests.factories import SIDE, tiny_squid
from tests.kernels.devices import DEVICE, ON_GPU, tensors
from tests.ops.samples import (
    LAST,
    convolution_inputs,
    normal,
    plain_convolution,
    resized_convolution,
)
from tests.tolerances import TOLERANCES, assert_close

# The kernel serves half precision; in float32 it is tried in the interpreter, to see more digits.
DTYPES = [torch.float16, torch.bfloat16 if ON_GPU else torch.float32]

RESIZED = "resized", (1, 1), resized_convolution
CELLS = "cells", (1, 2), plain_convolution
STRIDED = "strided", (2, 2), partial(plain_convolution, stride=2)

Convolution = tuple[str, tuple[int, int], Callable[..., Tensor]]


def weights_of(convolution: Convolution, weight: Tensor, height: int, width: int) -> Tensor:
    name = convolution[0]
    if name == "resized":
        return resized_weights(weight, height, width).to(weight.dtype)
    return cell_weights(weight, 2 if name == "cells" else 1)


def check(
    convolution_: Convolution,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    residual: bool = False,
    head: bool = False,
) -> None:
    """One call for maps [B, C, height, width] and D channels, in that order but D third."""
    *_, D, height, width = shape
    x, weight, bias = convolution_inputs(*shape)
    _, step, plain = convolution_
    weights = weights_of(convolution_, weight, height, width).to(DEVICE, dtype)
    x, weight = (z.to(dtype) for z in (x, weight))
    size = plain(x.double(), weight.double(), bias).shape
    added = normal(*size, seed=3).to(dtype) if residual else None
    parts = (normal(D, seed=4), normal(1, seed=5)) if head else (None, None)
    on_device = [None if z is None else z.to(DEVICE, torch.float32) for z in parts]
    found = convolution.forward(
        x.to(DEVICE),
        weights,
        bias.to(DEVICE, torch.float32),
        list(step),
        None if added is None else added.to(DEVICE),
        *on_device,
    )
    expected = plain(
        x.double(),
        weight.double(),
        bias,
        None if added is None else added.double(),
        parts if head else None,
    )
    assert found.dtype == (torch.float32 if head else dtype)
    assert head or found.is_contiguous(memory_format=LAST)
    assert_close(found.cpu(), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (2, 2), (3, 5), (5, 4)])
def test_phases(height: int, width: int, dtype: torch.dtype) -> None:
    check(RESIZED, (3, 16, 32, height, width), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (4, 2), (3, 67)])
def test_cells(height: int, width: int, dtype: torch.dtype) -> None:
    check(CELLS, (3, 32, 32, height, width), dtype, residual=True)


@pytest.mark.parametrize("height", [3, 6])
def test_a_step_of_two(height: int) -> None:
    check(STRIDED, (2, 32, 64, height, 5), torch.float16)


@pytest.mark.parametrize("convolution_", [RESIZED, CELLS], ids=lambda c: c[0])
@pytest.mark.parametrize("residual", [False, True])
def test_head(residual: bool, convolution_: Convolution) -> None:
    check(convolution_, (2, 16, 16, 3, 5), DTYPES[-1], residual, head=True)


@pytest.mark.parametrize(
    ("convolution_", "shape"),
    [
        (RESIZED, (2, 64, 32, 19, 10)),  # inner tiles in both directions, 128 columns
        (RESIZED, (1, 128, 64, 4, 3)),  # two steps a pixel, two blocks of columns
        (RESIZED, (40, 16, 16, 3, 9)),  # borders of more images than a tile takes
        (CELLS, (1, 32, 32, 17, 37)),  # several tiles, the last ones cut off
        (CELLS, (2, 16, 16, 9, 8)),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else str(value),
)
def test_tiles(convolution_: Convolution, shape: tuple[int, int, int, int, int]) -> None:
    check(convolution_, shape, torch.float16)


def call(x: Tensor, weight: Tensor, bias: Tensor, **rest: Any) -> Tensor:
    weights = resized_weights(weight, *x.shape[2:]).to(x)
    return ops.cell_convolution(x, weights, bias.float(), **rest)


def test_strides_do_not_matter_and_bits_repeat() -> None:
    x, weight, bias = tensors(convolution_inputs(2, 16, 16, 6, 8), torch.float16)
    strided, expanded = x[:, :, ::2, ::2], x[:, :1, :1, :1].expand(2, 16, 3, 4)
    residual = normal(2, 16, 6, 8, seed=7).to(DEVICE, torch.float16)
    for given in (strided, expanded):
        first = call(given, weight, bias, residual=residual)
        dense = given.contiguous(memory_format=LAST), residual.to(memory_format=LAST)
        assert torch.equal(first, call(dense[0], weight, bias, residual=dense[1]))


def test_parameters_of_any_strides() -> None:
    x, weight, _ = tensors(convolution_inputs(1, 16, 16, 3, 3), torch.float16)
    bias, head, one = (normal(n, seed=n).to(DEVICE, torch.float32) for n in (2, 32, 1))
    bias, head = bias[:1].expand(16), head[::2]
    found = call(x, weight, bias, head=(head, one))
    dense = call(x, weight, bias.contiguous(), head=(head.contiguous(), one))
    assert torch.equal(found, dense)


def test_nan_stays_in_its_windows() -> None:
    x, weight, bias = tensors(convolution_inputs(2, 16, 16, 5, 6), torch.float16)
    clean = call(x, weight, bias)
    x[1, 3, 2, 1] = torch.nan
    found = call(x, weight, bias)
    near = torch.zeros(2, 10, 12, dtype=torch.bool, device=DEVICE)
    near[1, 2:8, 0:6] = True  # cells of the pixel and of its neighbours
    assert torch.equal(found.isnan().all(dim=1), near)
    assert torch.equal(found.isnan().any(dim=1), near)
    assert torch.equal(found.movedim(1, -1)[~near], clean.movedim(1, -1)[~near])


def stage(block: DoubleConv, side: int | None) -> Stage:
    return Stage(block, torch.float16, LAST, onednn=False, side=side).to(DEVICE)


@pytest.mark.parametrize("side", [None, 16])
def test_a_stage_of_the_network(side: int | None) -> None:
    """With kernels, and by the library in float32: the convolutions meant are served."""
    torch.manual_seed(0)
    block, out = DoubleConv(16, 16).eval(), OutConv(16, 1)
    exact = Stage(block, torch.float32, LAST, onednn=False, side=side)
    own = stage(block, side)
    x = torch.rand(1, 16, side or 9, side or 9).to(memory_format=LAST)
    half = x.to(DEVICE, torch.float16)
    parts = {name: part for name, part in own.named_children() if isinstance(part, CellConv)}
    assert list(parts) == ["first"] * (side is not None) + ["second", "third"]
    assert all(part.serves(half) for part in parts.values())
    images = torch.rand(1, 1, *exact(x).shape[2:])
    with torch.inference_mode():
        assert_close(own(half).cpu(), exact(x))
        expected = exact(x, None, 1, Head(out, 1), images)
        found = own(half, None, 1, Head(out.to(DEVICE), 1), images.to(DEVICE))
        for value, wanted in zip(found, expected, strict=True):
            assert_close(value.cpu(), wanted.cpu(), 4e-3)
        if side is None:  # the resize has a kernel of its own
            with kernels.use("off"):
                assert not any(part.serves(half) for part in parts.values())
                assert_close(own(half).cpu(), exact(x))


def test_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel makes its last stage, with the head behind it, and the result is the same."""
    model = tiny_squid(features_root=16, memory_channel=576).eval()
    images = torch.rand(1, 1, SIDE, SIDE, device=DEVICE)
    exact, own = (
        FrozenGenerator(model, dtype, LAST).to(DEVICE) for dtype in (torch.float32, torch.float16)
    )
    calls = []
    forward = convolution.forward
    monkeypatch.setattr(
        convolution, "forward", lambda *given: calls.append(given) or forward(*given)
    )
    with torch.inference_mode():
        expected, found = exact(images), own(images)
    assert [given[3] for given in calls] == [[1, 2]] * 6 + [[1, 1]] + [[1, 2]] * 2
    assert [given[5] is not None for given in calls] == [False] * 8 + [True]
    assert found.dtype == torch.float32
    assert expected.std() > 1e-3
    assert (found - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("served", "serves"),
    [
        (True, lambda x, w: dispatch.serves_cell_convolution(x(16), w(16, 16))),
        (False, lambda x, w: dispatch.serves_cell_convolution(x(16).float(), w(16, 16))),
        (False, lambda x, w: dispatch.serves_cell_convolution(x(24), w(24, 16))),
        (False, lambda x, w: dispatch.serves_cell_convolution(x(16), w(16, 24))),
        (False, lambda x, w: dispatch.serves_cell_convolution(x(16)[:0], w(16, 16))),
        (
            False,
            lambda x, w: dispatch.serves_cell_convolution(
                x(16)[:, :, :1, :1].expand(1, 16, 2**13, 2**13), w(16, 16)
            ),
        ),
        (True, lambda x, w: dispatch.serves_phases(x(16), w(16, 32))),
        (False, lambda x, w: dispatch.serves_phases(x(16)[:, :, :15], w(16, 32))),
        (True, lambda x, w: dispatch.serves_narrow_convolution(x(32), w(32, 32))),
        (False, lambda x, w: dispatch.serves_narrow_convolution(x(32), w(32, 64))),
    ],
)
def test_the_rules(served: bool, serves: Callable[..., bool]) -> None:
    def x(channels: int) -> Tensor:
        size = (1, channels, 1, 1)
        return torch.zeros(size, dtype=torch.float16, device=DEVICE).expand(1, channels, 16, 16)

    def weights(channels: int, to: int) -> Tensor:
        return torch.zeros(1, 1, 3, 4, channels, 1, 2, to, dtype=torch.float16, device=DEVICE)

    assert serves(x, weights) == served
