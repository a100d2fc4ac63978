"""The generator (paper section 3.1 and figure 2): encoder, in-painting, student and teacher."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..ops.patches import to_image, to_patches
from ..presets import PRESETS, preset
from .distillation import distillation_loss
from .images import VALUE_RANGE, check_precision, check_tensor, check_values
from .inpaint import InpaintBlock, check_variant
from .memory import BLOCKS, describe_shrinkage
from .state import Network, differences
from .unet import Down, InConv, OutConv, Up

MAX_LEVEL = 5
_log = logging.getLogger("squid_fast")


class SQUID(Network):
    """Drop-in for the published auto-encoder: the same constructor, outputs and state dict.

    Args:
        features_root: F; the widths of the levels are F, 2F, 4F, 8F, 16F, 16F.
        shrink_thres: shrinkage of every memory: an int k > 0 is Gumbel shrinkage, a float > 0 hard
            shrinkage, 0 none. The type decides, as published: 5 and 5.0 are different methods.
        num_slots: M of the memory queues.
        num_patch: P, patches per side; N = P * P.
        level: L, how often the resolution is halved, 1 to 5.
        ratio: chance that a position is in-painted in training (masked shortcut).
        drop: dropout of the in-painting block.
        memory_channel: C of the queues; it fixes the image size: C = w_L / 4 * (H / P / 2**L)**2.
        dist: add the teacher and its distillation loss.
        initial_combine: the decoder combines the patches to an image before its step
            L - ``initial_combine``, so that skips of the levels below are whole images; None: after
            its last step.
        mem_num_slots: M of the decoder's memory matrices.
        ops: "concat" (with skip) or "none" for each decoder step, deepest first.
        decoder_memory: for each level, finest first, None or a dict of ``type``
            (MemoryMatrixBlock, MemoryMatrixBlockV3, MemoryMatrixBlockV4), ``multiplier``
            (C = w_i * multiplier), ``num_memory`` and optionally ``ratio``.
        inpainting: for ablations: arguments of ``InpaintBlock`` that the published block does not
            have, ``memory``, ``mixing``, ``shortcut``, or False to go without the block.

    Raises:
        ValueError: arguments do not fit each other; the message says which would.

    >>> model = SQUID.from_preset("small").eval()
    >>> outputs = model(torch.rand(2, 1, 48, 48))
    >>> outputs["recon"].shape, outputs["patch"].shape
    (torch.Size([2, 1, 48, 48]), torch.Size([18, 1, 16, 16]))

    Attributes:
        value_range: smallest and greatest value of a pixel, (0.0, 1.0).
    """

    value_range: ClassVar[tuple[float, float]] = VALUE_RANGE

    def __init__(
        self,
        num_in_ch: int,
        features_root: int,
        shrink_thres: int | float,
        num_slots: int = 200,
        num_patch: int = 2,
        level: int = 4,
        ratio: float = 0.95,
        drop: float = 0.0,
        memory_channel: int = 2048,
        dist: bool = False,
        initial_combine: int | None = None,
        mem_num_slots: int = 200,
        ops: Sequence[str] = ("concat", "concat", "none", "none"),
        decoder_memory: Sequence[dict[str, Any] | None] | None = None,
        *,
        inpainting: dict[str, str] | Literal[False] | None = None,
    ) -> None:
        super().__init__()
        decoder_memory = list(decoder_memory or [None] * level)
        self.config: dict[str, Any] = {
            key: value for key, value in locals().items() if key not in ("self", "__class__")
        } | {"ops": list(ops)}
        if inpainting is None:
            del self.config["inpainting"]  # what is left are the published arguments
        widths = [features_root * factor for factor in (1, 2, 4, 8, 16, 16)]
        self.num_in_ch, self.num_patch, self.level, self.dist = num_in_ch, num_patch, level, dist
        self.initial_combine = initial_combine
        self.image_size = _check_config(self.config, widths)
        _log.info("memories with %s", describe_shrinkage(shrink_thres))

        self.in_conv = InConv(num_in_ch, features_root)
        self.down_blocks = nn.ModuleList(Down(widths[i], widths[i + 1]) for i in range(level))
        check_variant(inpainting or {})
        self.inpaint_block: nn.Module = nn.Identity()
        if inpainting is not False:
            self.inpaint_block = InpaintBlock(
                widths[level], num_slots, num_patch**2, memory_channel, shrink_thres, ratio, drop,
                **(inpainting or {}),
            )  # fmt: skip
        self.up_blocks = _decoder(widths, level, ops)
        self.memory_blocks = nn.ModuleList(
            nn.Identity()
            if entry is None
            else BLOCKS[entry["type"]](
                mem_num_slots,
                widths[i] * entry["multiplier"],
                entry["num_memory"],
                shrink_thres,
                entry.get("ratio", 0.95),
            )
            for i, entry in enumerate(decoder_memory)
        )
        self.out_conv = OutConv(features_root, num_in_ch)
        if dist:
            self.teacher_ups = _decoder(widths, level, ops)
            self.teacher_out = OutConv(features_root, num_in_ch)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> SQUID:
        """A model of ``PRESETS``, with any arguments overridden; ValueError for other names."""
        return cls(**{**preset(name).model, **overrides})

    def fitting(self, state: Mapping[str, Any]) -> str:
        if any(name.endswith("conv_model.0.weight") for name in state):
            return "It is the state dict of a Discriminator"
        with torch.device("meta"):
            models = {name: SQUID.from_preset(name).state_dict() for name in PRESETS}
        if names := [repr(name) for name, own in models.items() if not differences(own, state)]:
            return f"The preset {' or '.join(names)} would fit"
        if "shape" in differences(self.state_dict(), state):
            return "It fits no preset; its model's own arguments would (convert --config)"
        return ""

    def forward(self, images: Tensor, teacher: bool = True) -> dict[str, Tensor | None]:
        """Reconstruct images [B, Cin, H, W] in [0, 1]; returns the published dictionary.

        ``recon`` [B, Cin, H, W], ``patch`` (recon in patches) [B*N, Cin, H/P, W/P], ``embedding``
        [B, w_L, H/2**L, W/2**L], ``teacher_recon`` [B, Cin, H, W], ``dist_loss`` []. The last two
        are None without a teacher or with ``teacher=False``, which saves its work.

        Raises:
            ValueError: images of another shape or dtype, or with values that are NaN or outside
                ``value_range`` (not checked while compiling or capturing, nor in training on a
                GPU, where the check would stall every step).
        """
        embedding, skips = self.encode(images)
        recon, student = self.decode(self.inpaint_block(embedding), skips)
        teacher_recon, dist_loss = None, None
        if self.dist and teacher:
            skips = [skip.detach() for skip in skips]
            teacher_recon, features = self._decode(
                embedding.detach(), skips, self.teacher_ups, self.teacher_out
            )
            dist_loss = distillation_loss(student, features)
        return {
            "recon": recon,
            "patch": to_patches(recon, self.num_patch),
            "embedding": to_image(embedding, self.num_patch),
            "teacher_recon": teacher_recon,
            "dist_loss": dist_loss,
        }

    def encode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features of the patches [B*N, w_L, h, w] and the skips, finest first.

        Skips of the levels below ``initial_combine`` are whole images, the others patches. Images
        that do not fit raise ValueError, as in ``forward``.
        """
        check_tensor(images, self.value_range)
        check_shape(images, self.config, self.image_size)
        check_precision(images, self)
        check_values(images, self.value_range, self.training)
        x = self.in_conv(to_patches(images, self.num_patch))
        skips = []
        for i, down in enumerate(self.down_blocks):
            skips.append(to_image(x, self.num_patch) if i < (self.initial_combine or 0) else x)
            x = down(x)
        return x, skips

    def decode(self, x: Tensor, skips: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The student's reconstruction [B, Cin, H, W] and the features of every step."""
        return self._decode(x, skips, self.up_blocks, self.out_conv, self.memory_blocks)

    def _decode(
        self,
        x: Tensor,
        skips: list[Tensor],
        ups: nn.ModuleList,
        head: nn.Module,
        memories: nn.ModuleList | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        features = []
        for i, up in enumerate(ups):
            deep = self.level - 1 - i
            x = up(x, skips[deep], self.num_patch if self.initial_combine == deep + 1 else 1)
            if memories is not None:
                x = memories[deep](x)
            features.append(x)
        if self.initial_combine is None:
            x = to_image(x, self.num_patch)
        return head(x), features


def check_shape(images: Tensor, config: dict[str, Any], side: int) -> None:
    """Raise ValueError unless the model takes images of this shape."""
    fitting = f"[B, {config['num_in_ch']}, {side}, {side}]"
    if images.dim() != 4 or images.shape[1] != config["num_in_ch"]:
        raise ValueError(f"images are {list(images.shape)}; this model takes {fitting}.")
    if images.shape[2] != side or images.shape[3] != side:
        raise ValueError(
            f"images are {images.shape[2]} x {images.shape[3]}; with num_patch="
            f"{config['num_patch']}, level={config['level']} and memory_channel="
            f"{config['memory_channel']} they must be {side} x {side}."
        )


def _decoder(widths: list[int], level: int, ops: Sequence[str]) -> nn.ModuleList:
    widths = widths[level::-1]  # deepest first
    return nn.ModuleList(
        Up(deep + fine if op == "concat" else deep, fine, op)
        for deep, fine, op in zip(widths, widths[1:], ops, strict=False)
    )


def _check_config(config: dict[str, Any], widths: list[int]) -> int:
    """The image side that the arguments fix; raises ValueError unless they fit each other."""
    L, P, C = config["level"], config["num_patch"], config["memory_channel"]
    if not 1 <= L <= MAX_LEVEL:
        raise ValueError(f"level is {L}; it must lie between 1 and {MAX_LEVEL}.")
    if P < 1:
        raise ValueError(f"num_patch is {P}; it must be at least 1.")
    if widths[0] < 1 or widths[L] % 4:
        raise ValueError(
            f"features_root is {widths[0]}; the bottleneck is a quarter of the deepest width "
            f"{widths[L]}, which 4 must divide."
        )
    combine = config["initial_combine"]
    if combine is not None and not 1 <= combine <= L:
        raise ValueError(
            f"initial_combine is {combine}; it must lie between 1 and level={L}, or be None."
        )
    if not 0.0 <= config["ratio"] <= 1.0:
        raise ValueError(f"ratio is {config['ratio']}; it must lie in [0, 1].")
    if len(config["ops"]) != L or any(op not in ("concat", "none") for op in config["ops"]):
        raise ValueError(
            f"ops is {config['ops']}; it must have level={L} entries, each 'concat' or 'none'."
        )
    narrow = widths[L] // 4
    side = math.isqrt(C // narrow)
    if narrow > C or narrow * side * side != C:
        fitting = [narrow * s * s for s in range(1, 9)]
        raise ValueError(
            f"memory_channel is {C}; it must be {narrow} (a quarter of width {widths[L]}) times "
            f"the pixels of a patch's deepest map, one of {fitting} for maps of 1 to 8 pixels a "
            "side."
        )
    if len(config["decoder_memory"]) != L:
        raise ValueError(
            f"decoder_memory has {len(config['decoder_memory'])} entries; it must have level={L}."
        )
    for i, entry in enumerate(config["decoder_memory"]):
        if entry is not None:
            whole = i < (combine or 0)
            pixels = side * 2 ** (L - i) * (P if whole else 1)
            _check_decoder_memory(i, entry, pixels, P, whole)
    return P * side * 2**L


def _check_decoder_memory(
    i: int, entry: dict[str, Any], pixels: int, num_patch: int, whole: bool
) -> None:
    """Raise ValueError unless entry i fits its map of ``pixels`` a side (a patch or ``whole``)."""
    where = f"decoder_memory[{i}]"
    if entry.get("type") not in BLOCKS:
        raise ValueError(f"{where} has type {entry.get('type')!r}; known are {sorted(BLOCKS)}.")
    if missing := {"multiplier", "num_memory"} - entry.keys():
        raise ValueError(f"{where} lacks {sorted(missing)}.")
    num, multiplier = entry["num_memory"], entry["multiplier"]
    cuts = math.isqrt(num)
    if entry["type"] == "MemoryMatrixBlockV3":
        if whole:
            raise ValueError(
                f"{where} is a MemoryMatrixBlockV3, which needs patches, but initial_combine puts "
                "the patches together before that level."
            )
        if num != num_patch**2:
            raise ValueError(
                f"{where} has num_memory={num}; a MemoryMatrixBlockV3 needs one for each of the "
                f"{num_patch**2} patches."
            )
        fitting = pixels**2
    else:
        if num < 1 or cuts * cuts != num or pixels % cuts:
            raise ValueError(
                f"{where} has num_memory={num}; it must be a square number whose root divides "
                f"the map's side of {pixels} pixels."
            )
        fitting = pixels**2 if entry["type"] == "MemoryMatrixBlockV4" else (pixels // cuts) ** 2
    if multiplier != fitting:
        raise ValueError(
            f"{where} has multiplier={multiplier}; its memories hold {fitting} pixels of a map of "
            f"{pixels} x {pixels}, so multiplier={fitting} would fit."
        )
