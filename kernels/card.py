"""What a launcher needs to know about the GPU that it launches on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Card:
    """A GPU as far as configurations depend on it.

    Attributes:
        arch: as compilers name it, such as ``"sm_90"`` or ``"gfx942"``.
        multiprocessors: how many programs run side by side at least.
        shared_memory: bytes that one program may use.
    """

    arch: str
    multiprocessors: int
    shared_memory: int

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def float32_precision(self) -> str:
        """How float32 matrices are multiplied: as exactly as float32, on the matrix units.

        NVIDIA's take ten bits of mantissa, so three products of split operands make up one; AMD's
        CDNA multiplies float32 as it is.
        """
        return "ieee" if self.is_amd else "tf32x3"


# Kernels are compiled for these without having them: bench.machine_code.
A100 = Card("sm_80", multiprocessors=108, shared_memory=163 * 1024)
H100 = Card("sm_90", multiprocessors=132, shared_memory=227 * 1024)
MI300X = Card("gfx942", multiprocessors=304, shared_memory=64 * 1024)

_assumed = H100  # for tensors that lie on no GPU: the interpreter's, and those of reports


@contextmanager
def assume(card: Card) -> Iterator[None]:
    """Configure launches of tensors that lie on no GPU for this card."""
    global _assumed
    before, _assumed = _assumed, card
    try:
        yield
    finally:
        _assumed = before


@cache
def _inspect(device: torch.device) -> Card:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
        return Card(arch, properties.multi_processor_count, properties.shared_memory_per_block)
    arch = f"sm_{properties.major}{properties.minor}"
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Card(arch, properties.multi_processor_count, shared)


def card_of(x: torch.Tensor) -> Card:
    """The card on which ``x`` lies."""
    return _inspect(x.device) if x.is_cuda else _assumed


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Launch on the device of ``x``: Triton itself takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n``, the only sizes a tile can have."""
    return 1 << max(n - 1, 0).bit_length()
