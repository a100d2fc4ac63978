"""SQUID: unsupervised anomaly detection in radiographs by space-aware in-painting."""

from typing import TYPE_CHECKING

from ._lazy import lazy_names

if TYPE_CHECKING:
    from . import ops
    from .bundle import Bundle, load_bundle, save_bundle
    from .inference import Scorer, Scores, calibrate
    from .modules import SQUID, Discriminator, InpaintBlock, MemoryMatrix, MemoryQueue
    from .presets import PRESETS, Preset, Recipe
    from .screening import screen
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "bundle": ("Bundle", "load_bundle", "save_bundle"),
            "inference": ("Scorer", "Scores", "calibrate"),
            "modules": ("SQUID", "Discriminator", "InpaintBlock", "MemoryMatrix", "MemoryQueue"),
            "presets": ("PRESETS", "Preset", "Recipe"),
            "screening": ("screen",),
        },
    )

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
