"""Which device is chosen."""

from __future__ import annotations

import pytest
import torch

from squid_fast.utils.devices import choose_device, choose_precision, has_fast_bf16


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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gpu", "device is 'gpu'; it must be 'cpu', 'cuda', 'cuda:1' or the like"),
        ("cuda:x", "device is 'cuda:x'; it must be 'cpu'"),
        ("cuda:2", "device is 'cuda:2', but PyTorch sees 2 GPUs here; 'cuda:1' is the last"),
        ("mps", "device is 'mps', of which PyTorch sees none here; 'cpu' fits"),
        ("xpu:0", "device is 'xpu:0', of which PyTorch sees none here; 'cpu' fits"),
        ("meta", "device is 'meta', of which PyTorch sees none here; 'cpu' fits"),
    ],
)
def test_what_is_not_there_is_refused(
    given: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=said):
        choose_device(given)


def test_an_accelerator_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert choose_device("mps") == torch.device("mps")


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_compute_in_float32_whatever_the_processor_has(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = dict.fromkeys(("avx512_bf16", "avx512_vnni", "amx_bf16", "bf16"), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: every)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert has_fast_bf16(torch.device("cpu"))
    assert not has_fast_bf16(torch.device(device))
    assert choose_precision("auto", torch.device(device)) == "float32"
    with pytest.raises(ValueError, match=f"this {device} does not, so 'float32' or 'auto'"):
        choose_precision("bf16", torch.device(device))
