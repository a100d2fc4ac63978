"""SQUID: unsupervised anomaly detection in radiographs by space-aware in-painting."""

from typing import TYPE_CHECKING

from ._version import __version__
from .utils.lazy import lazy_names
from .utils.moved import accept_old_paths

if TYPE_CHECKING:
    from . import ops
    from .inference import Bundle, Scorer, Scores, calibrate, load_bundle, save_bundle
    from .modules import SQUID, Discriminator, InpaintBlock, MemoryMatrix, MemoryQueue
    from .presets import PRESETS, Preset, Recipe
    from .screening import screen
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "inference": ("Bundle", "Scorer", "Scores", "calibrate", "load_bundle", "save_bundle"),
            "modules": ("SQUID", "Discriminator", "InpaintBlock", "MemoryMatrix", "MemoryQueue"),
            "presets": ("PRESETS", "Preset", "Recipe"),
            "screening": ("screen",),
        },
    )

accept_old_paths()

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
