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
    "inpaint_block",
    "window_lookup",
)
CONTENDERS = ("eager", "squid_fast", "compiled")  # reference eager, ours, reference compiled
SELECTIONS = ("tiny", "core", "all")
DIRECTIONS = ("forward", "forward_backward", "forward_backward_slots")
# How many of them an operation has, where it is not the first two.
DIRECTED = {"memory_lookup": 3, "window_lookup": 1}


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
        if operation == "neighbourhood_attention":
            yield {"B": B, "N": 4, "C": C}
            yield {"B": B, "N": 9, "C": C // 2}
        elif operation == "window_lookup":
            for c, side in ((4, 4),) if tiny else ((256, 8), (128, 16)):
                sizes = {"B": B, "N": 4, "c": c, "side": side, "grid": 2}
                yield sizes | {"M": 7 if tiny else 200, "k": 5}
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


def cases(device: torch.device, selection: str = "core") -> list[Case]:
    """All cases of a selection ("tiny", "core" or "all") on a device."""
    dtypes = ("bfloat16", "float32") if device.type == "cuda" else ("float32",)
    return [
        Case(operation, direction, dtype, tuple(sizes.items()))
        for operation in OPERATIONS
        for dtype, direction in itertools.product(dtypes, DIRECTIONS[: DIRECTED.get(operation, 2)])
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
