"""The model and its parts."""

from .discriminator import Discriminator, ScoreMode, discriminator_size
from .inpaint import InpaintBlock
from .memory import MemoryMatrix, MemoryQueue
from .squid import SQUID

__all__ = [
    "SQUID",
    "Discriminator",
    "InpaintBlock",
    "MemoryMatrix",
    "MemoryQueue",
    "ScoreMode",
    "discriminator_size",
]
