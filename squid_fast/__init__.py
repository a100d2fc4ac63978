"""SQUID: unsupervised anomaly detection in radiographs by space-aware in-painting."""

from . import ops
from .bundle import Bundle, load_bundle, save_bundle
from .inference import Scorer, Scores, calibrate
from .modules import SQUID, Discriminator, InpaintBlock, MemoryMatrix, MemoryQueue
from .presets import PRESETS, Preset, Recipe
from .screening import screen

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "SQUID",
    "Bundle",
    "Discriminator",
    "InpaintBlock",
    "MemoryMatrix",
    "MemoryQueue",
    "Preset",
    "Recipe",
    "Scorer",
    "Scores",
    "__version__",
    "calibrate",
    "load_bundle",
    "ops",
    "save_bundle",
    "screen",
]
