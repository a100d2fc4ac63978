"""The one setting of TF32, with the interface of every version of PyTorch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from squid_fast.utils.tf32 import tf32


def stand_ins(
    monkeypatch: pytest.MonkeyPatch, by_operation: bool, products: Any
) -> tuple[Any, ...]:
    """Settings of convolutions, which PyTorch has on by default, and of products."""
    if by_operation:  # from PyTorch 2.9 on
        convolutions = SimpleNamespace(fp32_precision="tf32")
        cudnn, matmul = SimpleNamespace(conv=convolutions), SimpleNamespace(fp32_precision=products)
    else:
        cudnn = convolutions = SimpleNamespace(allow_tf32=True)
        matmul = SimpleNamespace(allow_tf32=products)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    return convolutions, matmul


def settings(places: tuple[Any, ...]) -> list[Any]:
    return [next(iter(vars(place).values())) for place in places]


@pytest.mark.parametrize(
    ("by_operation", "products", "off", "on"),
    [
        (True, "none", ["ieee", "none"], ["tf32", "tf32"]),
        (True, "tf32", ["ieee", "ieee"], ["tf32", "tf32"]),
        (False, False, [False, False], [True, True]),
        (False, True, [False, False], [True, True]),
    ],
)
def test_float32_inside_and_as_before_behind(
    monkeypatch: pytest.MonkeyPatch, by_operation: bool, products: Any, off: Any, on: Any
) -> None:
    places = stand_ins(monkeypatch, by_operation, products)
    before = settings(places)
    with tf32(False):
        assert settings(places) == off
        with tf32(True, products=True):
            assert settings(places) == on
        assert settings(places) == off
    assert settings(places) == before
    with pytest.raises(ZeroDivisionError), tf32(False):
        1 / 0  # noqa: B018
    assert settings(places) == before


def test_pytorchs_own_settings() -> None:
    def reads() -> bool:
        """Whether a float32 convolution may be in TF32, as this version says it."""
        if hasattr(torch.backends.cudnn, "conv"):
            return torch.backends.cudnn.conv.fp32_precision == "tf32"
        return torch.backends.cudnn.allow_tf32

    before = reads(), torch.backends.cuda.matmul.allow_tf32
    with tf32(False):
        assert (reads(), torch.backends.cuda.matmul.allow_tf32) == (False, False)
        with tf32(True):
            assert reads()
        assert not reads()
    # The former flags can still be read: they were not left in contradiction.
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
