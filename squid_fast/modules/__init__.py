"""The model and its parts."""

from .discriminator import Discriminator, ScoreMode, discriminator_size
from .inpaint import InpaintBlock
from .memory import MemoryMatrix, MemoryQueue
from .norm import freeze_cancelled_biases
from .squid import SQUID

__all__ = [
    "SQUID",
    "Discriminator",
    "InpaintBlock",
    "MemoryMatrix",
    "MemoryQueue",
    "ScoreMode",
    "discriminator_size",
    "freeze_cancelled_biases",
]
