"""The resize with its skip: values, gradients, layouts, edges; against the reference in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from squid_fast import ops, reference
from squid_fast.modules.unet import Up
from squid_fast.ops import upsample
from squid_fast.ops.patches import to_patches
from tests.ops.samples import DTYPES, Resize, normal, resize_inputs, with_gradients
from tests.tolerances import TOLERANCES, assert_close

SIZES: list[Resize] = [(1, 1, 1, 1, 1, 0), (1, 2, 3, 1, 7, 1), (1, 3, 17, 5, 3, 6)]
SIZES += [(2, 2, 5, 1, 1, 3), (2, 1, 5, 4, 6, 0), (3, 1, 2, 3, 5, 2), (2, 0, 3, 4, 4, 2)]

layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


def maps(sizes: Resize, dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    return [x.to(dtype).contiguous(memory_format=layout) for x in resize_inputs(sizes)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@layouts
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_upsampling_equals_reference(
    sizes: Resize, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    P, *inputs, grad = sizes[0], *maps(sizes, dtype, layout)
    actual = with_gradients(partial(ops.upsample_concat, num_patch=P), inputs, grad)
    plain = partial(reference.upsample_concat, num_patch=P)
    expected = with_gradients(plain, [x.double() for x in inputs], grad.double())
    for got, value in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, value, TOLERANCES[dtype])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("concat", [False, True])
def test_bits_and_layout_are_those_of_interpolate_and_cat(
    concat: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x, skip, _ = maps((1, 2, 16, 7, 5, 4), dtype, layout)
    expected = F.interpolate(x, size=(14, 10), mode="bilinear", align_corners=False)
    expected = torch.cat([skip, expected], dim=1) if concat else expected
    found = ops.upsample_concat(x, skip if concat else None)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


@layouts
def test_patches_are_those_of_to_patches(layout: torch.memory_format) -> None:
    image, skip, grad = maps((1, 2, 3, 6, 9, 4), torch.float32, layout)
    patches = to_patches(image, 3)
    whole = with_gradients(ops.upsample_concat, [image, skip], grad)
    ours = with_gradients(partial(ops.upsample_concat, num_patch=3), [patches, skip], grad)
    assert torch.equal(ours[0], whole[0])
    assert torch.equal(ours[1], to_patches(whole[1], 3))
    assert ours[0].is_contiguous(memory_format=layout)
    assert ours[1].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("num_patch", [1, 2])
def test_upsampling_gradcheck(num_patch: int) -> None:
    *inputs, _ = maps((num_patch, 2, 3, 2, 3, 2), torch.float64, torch.channels_last)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(partial(ops.upsample_concat, num_patch=num_patch), inputs)


def test_a_gradient_that_nobody_asks_for_is_not_computed(monkeypatch) -> None:
    x, skip, grad = maps((1, 1, 2, 3, 3, 2), torch.float32, torch.contiguous_format)
    monkeypatch.setattr(upsample, "_upsample_concat_backward_cpu", None)
    out = ops.upsample_concat(x, skip.requires_grad_())
    (found,) = torch.autograd.grad(out, skip, grad)
    assert torch.equal(found, grad[:, :2])


def test_the_skip_takes_the_dtype_of_the_maps() -> None:
    x, skip, grad = maps((1, 1, 2, 3, 3, 2), torch.float32, torch.contiguous_format)
    out, _, grad_skip = with_gradients(ops.upsample_concat, [x.bfloat16(), skip], grad)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[:, :2], skip.bfloat16())
    assert grad_skip.dtype == torch.float32
    assert torch.equal(grad_skip, grad[:, :2].bfloat16().float())


def test_autocast_leaves_the_maps_in_half_precision() -> None:
    # PyTorch's interpolation would widen them on a GPU, and its result be narrowed again.
    up, seen = Up(6, 4, "concat"), []
    up.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        up(torch.randn(1, 4, 4, 4).bfloat16(), torch.randn(1, 2, 8, 8))
    assert seen == [torch.bfloat16]


def test_a_stage_without_a_skip_puts_patches_together() -> None:
    up = Up(3, 2, "none").eval()
    image = normal(2, 3, 4, 6).float()
    unused = torch.empty(2, 5, 8, 12)
    assert torch.equal(up(to_patches(image, 2), unused, 2), up(image, unused))


@layouts
def test_upsampling_nan_stays_near(layout: torch.memory_format) -> None:
    x, skip, _ = maps((1, 1, 2, 6, 6, 3), torch.float32, layout)
    x[0, 1, 3, 3] = torch.nan
    out = ops.upsample_concat(x, skip)
    reached = torch.zeros_like(out, dtype=torch.bool)
    reached[0, 4, 5:9, 5:9] = True
    assert torch.equal(out.isnan(), reached)
