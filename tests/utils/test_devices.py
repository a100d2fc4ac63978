"""Which device is chosen."""

from __future__ import annotations

import pytest
import torch

from squid_fast.utils.devices import choose_device


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (None, "cuda:1"),
        ("auto", "cuda:1"),
        ("cuda", "cuda:1"),
        ("cuda:0", "cuda:0"),
        ("cpu", "cpu"),
    ],
)
def test_a_gpu_has_its_number(
    given: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another thread's current GPU may be another one.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device(given) == torch.device(chosen)


@pytest.mark.parametrize(("given", "chosen"), [(None, "cpu"), ("auto", "cpu"), ("cpu", "cpu")])
def test_without_a_gpu_it_is_the_cpu(
    given: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(given) == torch.device(chosen)
    with pytest.raises(ValueError, match="device is 'cuda', but PyTorch sees no GPU here"):
        choose_device("cuda")
