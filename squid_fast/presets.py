"""Presets: arguments of the model and the recipe of its training, as published and smaller."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .utils.arguments import is_number
from .utils.moved import renamed_field

Keep = Literal["last", "best"]

_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("batch_size", "epochs", "t_max", "n_critic", "validate_every"),
     lambda value: isinstance(value, int) and value >= 1, "be a whole number from 1 on"),
    (("lr", "discriminator_lr"), lambda value: value > 0, "be a number above 0"),
    (("generator_eps", "weight_decay", "lr_floor", "recon_w", "g_w", "t_w", "dist_w", "d_w"),
     lambda value: value >= 0, "be a number from 0 on"),
    (("shift", "scale"), lambda value: 0 <= value < 1, "lie in [0, 1)"),
    (("ema_decay",), lambda value: 0 <= value < 1, "lie in (0, 1), or be 0 for none"),
)  # fmt: skip
"""Fields of a recipe, which values fit them, and how to say so."""


@renamed_field("averaging", "ema_decay")
@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are the published ones for ZhangLab.

    Weights name the terms of the losses: reconstruction ``recon_w``, adversarial ``g_w``,
    teacher's reconstruction ``t_w``, distillation ``dist_w``, discriminator ``d_w``. Every batch
    trains the discriminator, every ``n_critic``-th batch the generator too. ``t_max`` (epochs) and
    ``lr_floor`` (a fraction of ``lr``) shape the generator's cosine schedule. ``shift`` and
    ``scale`` bound the random augmentation, as fractions of the image side. ``ema_decay`` is the
    largest share of the discriminator's moving average that a step keeps, see
    ``squid_fast.training.ema``; with 0, as published, there is no average, and the discriminator
    of the last step is kept. ``validate_every`` counts epochs. ``keep`` is which epoch's pair
    becomes the trained model: the last one's, or that with the best AUROC of the paper's score
    among those that were validated (the last where no validation images of both kinds are given).

    Raises:
        ValueError: a value that nothing can be trained with.

    >>> recipe = Recipe(epochs=10, ema_decay=0.998)
    >>> recipe.batch_size, recipe.lr
    (16, 0.0001)
    """

    batch_size: int = 16
    epochs: int = 200
    lr: float = 1e-4
    discriminator_lr: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    generator_eps: float = 1e-7
    weight_decay: float = 1e-5
    t_max: int = 300
    lr_floor: float = 0.1
    n_critic: int = 2
    recon_w: float = 10.0
    g_w: float = 0.005
    t_w: float = 0.01
    dist_w: float = 0.001
    d_w: float = 0.005
    shift: float = 0.05
    scale: float = 0.05
    ema_decay: float = 0.0
    validate_every: int = 5
    keep: Keep = "last"

    def __post_init__(self) -> None:
        for names, fits, wanted in _RANGES:
            for name in names:
                value = getattr(self, name)
                if not (is_number(value) and -math.inf < value < math.inf and fits(value)):
                    raise ValueError(f"{name} is {value!r}; it must {wanted}.")
        betas: Any = self.betas
        pair = betas if isinstance(betas, tuple | list) else ()
        if [is_number(beta) and 0 <= beta < 1 for beta in pair] != [True, True]:
            raise ValueError(f"betas are {self.betas}; they must be two numbers in [0, 1).")
        if self.keep not in get_args(Keep):
            raise ValueError(f"keep is {self.keep!r}; it must be 'last' or 'best'.")


def current_names(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that was saved, by the names that they have now."""
    names = {"averaging": "ema_decay"}
    return {names.get(name, name): value for name, value in recipe.items()}


@dataclass(frozen=True)
class Preset:
    """A configuration by name: the arguments of ``SQUID``, and how it is trained.

    ``image_size``, the side of the images in pixels, follows from ``model``.

    >>> PRESETS["small"].image_size, PRESETS["small"].recipe.epochs
    (48, 100)
    """

    name: str
    image_size: int
    model: dict[str, Any] = field(repr=False)
    recipe: Recipe = field(default_factory=Recipe, repr=False)


def _memories(kind: str, num_memory: int, *multipliers: int) -> list[dict[str, Any]]:
    return [{"type": kind, "multiplier": m, "num_memory": num_memory} for m in multipliers]


_CHEST_XRAY: dict[str, Any] = {
    "num_in_ch": 1, "features_root": 32, "shrink_thres": 5, "num_slots": 200, "num_patch": 2,
    "level": 4, "ratio": 0.95, "drop": 0.0, "memory_channel": 2048, "dist": True,
    "initial_combine": 2, "mem_num_slots": 200, "ops": ["concat", "concat", "none", "none"],
    "decoder_memory": [None, None, *_memories("MemoryMatrixBlock", 4, 64, 16)],
}  # fmt: skip

_DIGIT_ANATOMY: dict[str, Any] = _CHEST_XRAY | {
    "num_patch": 3, "level": 3, "memory_channel": 1024, "initial_combine": 1,
    "ops": ["concat", "concat", "none"],
    "decoder_memory": [None, *_memories("MemoryMatrixBlockV3", 9, 256, 64)],
}  # fmt: skip

# For laptops. Without skips in the decoder everything in the reconstruction has passed through the
# memories, so that what is not in them cannot be copied; the presets above need far longer to get
# there.
_SMALL: dict[str, Any] = _CHEST_XRAY | {
    "features_root": 16, "num_patch": 3, "level": 3, "memory_channel": 128, "initial_combine": 1,
    "ops": ["none", "none", "none"], "decoder_memory": [None, None, None],
}  # fmt: skip

# The recipe of ``zhanglab`` in the epochs that a CPU has time for. What other settings do is in
# bench/results/README.md.
_SHORT = Recipe(epochs=40, ema_decay=0.998, validate_every=2, keep="best")
_DIGITS = Recipe(recon_w=1.0, n_critic=1, lr_floor=0.01, shift=0.0, scale=0.0)
_QUICK = Recipe(epochs=100, lr=3e-3, t_max=100, lr_floor=0.02, n_critic=1, shift=0.0, scale=0.0)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("zhanglab", 128, _CHEST_XRAY, Recipe(ema_decay=0.998, keep="best")),
        Preset("zhanglab_cpu", 128, _CHEST_XRAY, _SHORT),
        Preset("chexpert", 128, _CHEST_XRAY, Recipe(lr_floor=0.5, ema_decay=0.998, keep="best")),
        Preset("digit_anatomy", 96, _DIGIT_ANATOMY, _DIGITS),
        Preset("small", 48, _SMALL, _QUICK),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none.

    >>> preset("zhanglab").image_size
    128
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; known are {', '.join(PRESETS)}.")
    return PRESETS[name]
