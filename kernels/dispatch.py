"""Which calls the Triton kernels serve: the one place where that is decided, with the reasons.

Every other call runs on the PyTorch implementations in ``squid_fast.ops``, with the same results.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

SETTINGS = ("on", "off", "interpret")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The k best of a row are held in registers and searched by comparison; past this, sorting is the
# better method, and PyTorch sorts.
LARGEST_TOP_K = 64
# Up to here all scores of a lookup are computed before any is selected; beyond, the best are sought
# while they are computed, so that forward passes need no room for them.
LARGEST_SCORED = 512


def _checked(setting: str, source: str) -> str:
    if setting not in SETTINGS:
        raise ValueError(f"{source} is {setting!r}; it must be one of {', '.join(SETTINGS)}.")
    return setting


_setting = _checked(os.environ.get("SQUID_FAST_KERNELS", "on"), "SQUID_FAST_KERNELS")


@contextmanager
def use(setting: str) -> Iterator[None]:
    """Choose between kernels and PyTorch for the calls inside, whatever the environment says.

    Holds for the whole process, since PyTorch runs backward passes in threads of its own.

    Args:
        setting: ``"on"``: kernels on GPUs (the default). ``"off"``: PyTorch everywhere, to find out
            whether a kernel is at fault. ``"interpret"``: kernels for tensors of the CPU too, in
            Triton's interpreter, which needs ``TRITON_INTERPRET=1`` in the environment; slow.

    Raises:
        ValueError: another setting.
        RuntimeError: with ``"interpret"``, by a call inside while ``TRITON_INTERPRET`` is not 1.

    >>> with use("off"):
    ...     serves_hard_shrinkage(torch.zeros(2, 3))
    False
    """
    global _setting
    before = _setting
    _setting = _checked(setting, "setting")
    try:
        yield
    finally:
        _setting = before


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _is_able(device: torch.device) -> bool:
    # Older cards lack bfloat16 matrix instructions, for which the tiles are laid out.
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _serves(x: Tensor) -> bool:
    # float64 is for checking gradients, where PyTorch is itself the reference. An empty
    # tensor needs no launch.
    if _setting == "off" or x.dtype not in DTYPES or not x.numel() or not _has_triton():
        return False
    if x.device.type != "cpu":
        return x.is_cuda and _is_able(x.device)
    if _setting == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "kernels are to serve a tensor of the CPU, but TRITON_INTERPRET is "
            f"{os.environ.get('TRITON_INTERPRET')!r}; it must be '1' before Triton is imported."
        )
    return _setting == "interpret"


def serves_gumbel_shrinkage(logits: Tensor, top_k: int = 1) -> bool:
    """Whether a kernel shrinks these logits [..., M]; the backward has no ``top_k``."""
    return _serves(logits) and top_k <= LARGEST_TOP_K


def serves_hard_shrinkage(logits: Tensor) -> bool:
    """Whether a kernel shrinks these logits [..., M]."""
    return _serves(logits)


def serves_memory_lookup(query: Tensor, num_slots: int, mode: str, top_k: int) -> bool:
    """Whether kernels look up this query [B, N, C].

    Beyond ``LARGEST_SCORED`` slots, hard shrinkage and raw scores are two large matrix products
    with at most an elementwise step between them, at which cuBLAS is best.
    """
    if not _serves(query):
        return False
    return top_k <= LARGEST_TOP_K if mode == "gumbel" else num_slots <= LARGEST_SCORED


def serves_window_lookup(maps: Tensor, slots: Tensor, top_k: int) -> bool:
    """Whether kernels look up windows of these maps [B, c, H, W] in slots [parts, N, M, C].

    In half precision, which is what the products of split slots are for. All scores are written
    before any is selected, so that many slots are better sought by ``memory_lookup``. Addresses
    within 128 maps, and within the slots, are counted in 31 bits.
    """
    half = maps.dtype != torch.float32 and slots.dtype == maps.dtype
    few = slots.shape[2] <= LARGEST_SCORED and top_k <= LARGEST_TOP_K
    small = maps.shape[1:].numel() < 2**24 and slots.numel() < 2**31
    return _serves(maps) and half and few and small


def serves_masked_shortcut(inpainted: Tensor) -> bool:
    """Whether a kernel blends these maps [B, C, H, W], whose positions it counts in 31 bits."""
    return _serves(inpainted) and inpainted.numel() // inpainted.shape[1] < 2**31


def serves_neighbourhood_attention(query: Tensor) -> bool:
    """Whether a kernel attends from this query [B, N, C]."""
    return _serves(query)
