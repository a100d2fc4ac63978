"""What is timed: operations, directions, dtypes and the sizes people use."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

OPERATIONS = (
    "memory_lookup",
    "gumbel_shrinkage",
    "masked_shortcut",
    "neighbourhood_attention",
    "batch_norm",
    "upsample_concat",
    "inpaint_block",
    "stem",
    "reconstruct",
    "window_lookup",
    "cell_convolution",
    "queue_lookup",
    "split_linear",
    "discriminator_score",
)
SCORING = OPERATIONS[-7:]  # without gradients, the last three in float32 alone
CONTENDERS = ("eager", "squid_fast", "compiled")  # reference eager, ours, reference compiled
SELECTIONS = ("tiny", "core", "all")
DIRECTIONS = ("forward", "forward_backward", "forward_backward_slots")


@dataclass(frozen=True)
class Case:
    """One thing to time; ``sizes`` are pairs such as ``("B", 16)``."""

    operation: str
    direction: str
    dtype: str
    sizes: tuple[tuple[str, Any], ...]

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.sizes)

    @property
    def group(self) -> str:
        return f"{self.operation} {self.direction} {self.dtype} {self.label}"

    @property
    def unit(self) -> str:
        """The dtype of what is multiplied: numbers of float32 may be split into several."""
        return "bfloat16" if self.operation in ("queue_lookup", "split_linear") else self.dtype

    def is_compiled(self, selection: str, device: torch.device) -> bool:
        """Whether the compiled reference takes part: it costs up to a minute for each case."""
        if selection != "core":
            return selection == "all"
        sizes = dict(self.sizes)
        if device.type == "cpu":
            return sizes["B"] == 16 and sizes.get("M", 200) == 200
        return sizes["B"] in (16, 512, 4096) and sizes.get("M", 200) != 1000


def _is_core(operation: str, dtype: str, device: torch.device, sizes: dict[str, Any]) -> bool:
    """Whether a case is among the core ones; the others cost most time for the least news."""
    B, M = sizes["B"], sizes.get("M")
    if device.type == "cpu":
        return B <= 64 and M in (None, 200, 1000) and (operation, M) != ("inpaint_block", 1000)
    usual = (B in (16, 512), M != 1000)
    return all(usual) if dtype == "float32" else any(usual)


def _sizes(operation: str, tiny: bool) -> Iterator[dict[str, Any]]:
    C = 128 if tiny else 2048
    for B in (2,) if tiny else (1, 16, 64, 512, 4096):
        if operation == "discriminator_score":
            yield {"B": B, "side": 33 if tiny else 128, "mode": "instance"}
            yield {"B": B, "side": 33 if tiny else 128, "mode": "running"}
        elif operation == "neighbourhood_attention":
            yield {"B": B, "N": 4, "C": C}
            yield {"B": B, "N": 9, "C": C // 2}
        elif operation == "batch_norm":
            if B > 512:
                continue  # nobody trains with so many
            # zhanglab's first and deepest stage, as behind a convolution and at a stage's end.
            for C, side, residual in ((32, 64, False), (32, 64, True), (512, 4, False)):
                sizes = {"B": B, "N": 4, "C": C, "side": min(side, 8) if tiny else side}
                yield sizes | {"residual": residual}
        elif operation == "upsample_concat":  # N maps an image, of P x P patches each
            C, S, side = (8, 4, 3) if tiny else (256, 128, 8)
            yield {"B": B, "N": 4, "P": 1, "C": C, "S": S, "side": side}
            if B < 4096:  # where PyTorch's resize refuses the 2**31 elements of its result
                yield {"B": B, "N": 1, "P": 2, "C": C // 2, "S": 0, "side": 2 * side}
        elif operation in ("stem", "reconstruct"):
            for images in ("uint8", "float32"):
                sizes = {"B": B, "P": 2, "side": 16 if tiny else 128, "F": 8 if tiny else 32}
                yield sizes | {"images": images}
        elif operation == "cell_convolution":
            C, side = (16, 8) if tiny else (32, 128)
            for behind in ("nothing", "residual", "residual, head"):
                yield {"B": B, "C": C, "D": C, "side": side, "resized": False, "behind": behind}
            for deep in (2, 4):  # the last stages of the decoder
                sizes = {"B": B, "C": C * deep, "D": C * deep // 2, "side": side // deep}
                yield sizes | {"resized": True, "behind": "nothing"}
        elif operation == "window_lookup":
            for c, side in ((4, 4),) if tiny else ((256, 8), (128, 16)):
                sizes = {"B": B, "N": 4, "c": c, "side": side, "grid": 2}
                yield sizes | {"M": 7 if tiny else 200, "k": 5}
        elif operation == "queue_lookup":
            yield {"B": B, "N": 4, "M": 7 if tiny else 200, "C": C, "k": 5}
        elif operation == "split_linear":  # of the in-painting, behind its memory
            for T, S in ((C, C), (C, C // 4), (C // 4, C)):
                yield {"B": B, "N": 4, "T": T, "S": S}
        elif operation == "masked_shortcut":
            for layout, affine in (
                ("contiguous", False), ("channels_last", False), ("channels_last", True),
            ):  # fmt: skip
                sizes = {"B": B, "N": 4, "C": 32 if tiny else 512, "side": 4}
                yield sizes | {"layout": layout, "affine": affine}
        else:
            for M in (7,) if tiny else (200, 1000, 10_000):
                if operation == "gumbel_shrinkage":
                    yield {"B": B, "N": 4, "M": M, "k": 5}
                else:
                    wide = {"width": 32 if tiny else 512} if operation == "inpaint_block" else {}
                    yield {"B": B, "N": 4, "M": M, "C": C, "k": 5} | wide


def _dtypes(operation: str, device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda" or operation in SCORING[-3:]:
        return ("float32",)
    return ("bfloat16", "float32")


def _directions(operation: str) -> tuple[str, ...]:
    if operation in SCORING:
        return DIRECTIONS[:1]
    return DIRECTIONS if operation == "memory_lookup" else DIRECTIONS[:2]


def cases(device: torch.device, selection: str = "core") -> list[Case]:
    """All cases of a selection ("tiny", "core" or "all") on a device."""
    return [
        Case(operation, direction, dtype, tuple(sizes.items()))
        for operation in OPERATIONS
        for dtype, direction in itertools.product(
            _dtypes(operation, device), _directions(operation)
        )
        for sizes in _sizes(operation, selection == "tiny")
        if selection != "core" or _is_core(operation, dtype, device, sizes)
    ]


def schedule(
    device: torch.device, selection: str, operations: Collection[str] = OPERATIONS
) -> list[tuple[Case, str]]:
    """Cases with their contenders; the compiled ones, which are slow to prepare, come last."""
    every = [case for case in cases(device, selection) if case.operation in operations]
    plan = [(case, contender) for case in every for contender in CONTENDERS[:2]]
    return plan + [(c, "compiled") for c in every if c.is_compiled(selection, device)]
