"""Choice of device, precision and memory layout."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
Precision = Literal["auto", "bf16", "float32"]
ScoringPrecision = Literal["auto", "int8", "bf16", "float32"]
Backend = Literal["eager", "compile"]

BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")
INT8_UNITS = ("avx512_vnni", "avx_vnni", "amx_int8")
_UNITS_LEFT = {
    "SSE41": (), "AVX": (), "AVX2": (), "AVX2_VNNI": ("avx_vnni",), "AVX2_VNNI_2": ("avx_vnni",),
    "AVX512_CORE": (), "AVX512_CORE_VNNI": ("avx512_vnni",),
    "AVX512_CORE_BF16": ("avx512_vnni", "avx512_bf16"),
    "AVX512_CORE_FP16": ("avx512_vnni", "avx512_bf16"),
}  # fmt: skip
"""The units that oneDNN may use by the value of ``ONEDNN_MAX_CPU_ISA``; all for other values."""


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The given device; without one, a GPU if PyTorch sees any, else the CPU.

    A GPU without a number is the current one, and is returned with its number: every thread has a
    current one of its own.

    Raises:
        ValueError: there is no such device here.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device is {device!r}; it must be 'cpu', 'cuda', 'cuda:1' or the like."
        ) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but PyTorch sees no GPU here; 'cpu' fits.")
    if chosen.type == "cuda" and (chosen.index or 0) >= max(torch.cuda.device_count(), 1):
        count = torch.cuda.device_count()
        raise ValueError(
            f"device is {str(device)!r}, but PyTorch sees {count} GPU{'s'[: count - 1]} here; "
            f"'cuda:{count - 1}' is the last."
        )
    if chosen.type not in ("cpu", "cuda") and not _is_there(chosen):
        raise ValueError(f"device is {str(device)!r}, of which PyTorch sees none here; 'cpu' fits.")
    if chosen == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _is_there(device: torch.device) -> bool:
    """Whether PyTorch sees an accelerator of that type."""
    if not torch.accelerator.is_available():
        return False
    there = torch.accelerator.current_accelerator()
    return there is not None and there.type == device.type


def cpu_has(units: tuple[str, ...]) -> bool:
    """Whether the processor has one of the units and oneDNN, which convolves, may use it.

    The environment variable ``ONEDNN_MAX_CPU_ISA`` limits oneDNN to what older processors have.
    """
    # Older releases of PyTorch cannot tell; there the answer is no.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    left = _UNITS_LEFT.get(limit.upper(), units)
    return any(capabilities.get(unit) and unit in left for unit in units)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware is known to compute in bfloat16, rather than to emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has(BF16_UNITS)


def choose_precision(precision: Precision, device: torch.device) -> Literal["bf16", "float32"]:
    """The precision to compute in: "auto" is bfloat16 where the hardware has it, else float32.

    Raises:
        ValueError: the name is unknown, or the hardware does not compute in bfloat16.

    >>> choose_precision("float32", torch.device("cpu"))
    'float32'
    """
    if precision not in ("auto", "bf16", "float32"):
        raise ValueError(f"precision is {precision!r}; it must be 'auto', 'bf16' or 'float32'.")
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "float32"
    if precision == "bf16" and not has_fast_bf16(device):
        raise ValueError(
            "precision is 'bf16', which needs hardware that computes in bfloat16 (a processor with "
            "AVX512-BF16, AMX or ARM's BF16, or a CUDA GPU from the Ampere generation on); this "
            f"{device.type} does not, so 'float32' or 'auto' would fit."
        )
    return precision


def choose_layout(features_root: int) -> torch.memory_format:
    """The memory layout in which a model of that width is fast: channels-last, unless it is narrow.

    oneDNN has no vectorised channels-last convolution of 8 channels: on two AVX512 cores, a
    training step takes several times as long as with contiguous tensors. With 16, it saves a third.
    """
    return torch.channels_last if features_root % 16 == 0 else torch.contiguous_format


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block that a caller's ``torch.autocast`` does not reach.

    >>> with torch.autocast("cpu"), without_autocast(torch.device("cpu")):
    ...     (torch.eye(2) @ torch.eye(2)).dtype
    torch.float32
    """
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def named_layout(channels_last: bool) -> torch.memory_format:
    """The memory layout of that name; modules keep the name, as layouts cannot be pickled.

    ``torch.save`` fails at a ``torch.memory_format``, as pickle does below protocol 4.
    """
    return torch.channels_last if channels_last else torch.contiguous_format


def to_layout(module: Module, layout: torch.memory_format) -> Module:
    """Move the four-dimensional weights of a module to a memory layout, and return the module."""
    return module.to(memory_format=layout)  # type: ignore[call-overload]
