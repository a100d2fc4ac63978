"""The two ends of the network in scoring: values in every dtype, and what they refuse."""

from __future__ import annotations

from shutil import which

import pytest
import torch
from torch import Tensor

from squid_fast import kernels, ops
from squid_fast.kernels import dispatch
from tests.ops.samples import DTYPES, normal
from tests.ops.scoring import (
    SIZES,
    grey,
    head_weights,
    plain_reconstruction,
    plain_stem,
    sliced,
    stem_weights,
)
from tests.tolerances import TOLERANCES, assert_close


@pytest.mark.parametrize("Cin", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stem_equals_the_formula(size: tuple[int, int, int], dtype: torch.dtype, Cin: int) -> None:
    P, H, W = size
    weight, bias = stem_weights(6, Cin)
    for given in (torch.uint8, dtype):
        images = grey(2, H, W, given, Cin)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = ops.stem(images, weight.to(wide), bias.to(wide), P, dtype)
        assert found.dtype == dtype
        assert found.permute(0, 2, 3, 1).is_contiguous()
        assert_close(found, plain_stem(images, weight, bias, P))


@pytest.mark.parametrize("whole", [False, True], ids=["patches", "whole"])
@pytest.mark.parametrize("Cin", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reconstruction_equals_the_formula(
    size: tuple[int, int, int], dtype: torch.dtype, Cin: int, whole: bool
) -> None:
    P, H, W = size
    x, (weight, bias) = normal(2, 6, H, W).to(dtype), head_weights(6, Cin)
    given_x = x if whole else sliced(x, P).flatten(0, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for given in (torch.uint8, wide):
        images = grey(2, H, W, given, Cin)
        found = ops.reconstruct(given_x, weight, bias, images, P)
        expected = plain_reconstruction(x, weight, bias, images, P)
        for got, value in zip(found, expected, strict=True):
            assert got.dtype == wide
            assert got.is_contiguous()
            assert_close(got, value, TOLERANCES[wide])


def test_no_images() -> None:
    none, (weight, bias) = grey(0, 6, 6), stem_weights(5)
    assert ops.stem(none, weight, bias, 2).shape == (0, 5, 3, 3)
    recon, errors = ops.reconstruct(torch.zeros(0, 5, 3, 3), *head_weights(5), none, 2)
    assert recon.shape == (0, 1, 6, 6)
    assert errors.shape == (0, 4)


no_compiler = pytest.mark.skipif(
    not any(map(which, ("g++", "clang++", "c++"))), reason="there is no C++ compiler"
)


# Inductor alone asserts the strides that the fakes promise; on a CPU it needs a C++ compiler.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=no_compiler)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_compiled_equals_eager(dtype: torch.dtype, backend: str) -> None:
    torch.compiler.reset()
    stem, head, x = stem_weights(4), head_weights(3), normal(8, 3, 5, 5).float()

    def both(images: Tensor) -> tuple[Tensor, ...]:
        maps = ops.stem(images, *stem, 2, torch.bfloat16)
        return maps, *ops.reconstruct(x, *head, images, 2)

    images = grey(2, 10, 10, dtype)
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    for found, expected in zip(compiled(images), both(images), strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


# --- where kernels serve --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("served", "images", "dtype"),
    [
        (True, torch.zeros(1, 1, 4, 4), torch.bfloat16),
        (True, torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.float32),
        (False, torch.zeros(1, 2, 4, 4), torch.bfloat16),
        (False, torch.zeros(0, 1, 4, 4), torch.bfloat16),
        (False, torch.zeros(1, 1, 4, 4).double(), torch.float32),
        (False, torch.zeros(1, 1, 4, 4), torch.float64),
        (False, torch.zeros(1, 1, 1, 1).expand(1, 1, 2**15, 2**14), torch.float32),  # 2^29 times 4
    ],
)
def test_the_rules(
    served: bool, images: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with kernels.use("interpret"):
        assert dispatch.serves_stem(images, torch.zeros(4, 1, 3, 3), 1, dtype) == served
        x = torch.zeros(1, 4, 4, 4, dtype=dtype)[: len(images)]
        small = images.numel() < 2**20
        assert dispatch.serves_reconstruct(x, images) == (served or not small)
    assert not dispatch.serves_stem(images, torch.zeros(4, 1, 3, 3), 1, dtype)
