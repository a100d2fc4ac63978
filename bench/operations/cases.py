"""What is timed: operations, directions, dtypes and the sizes people use."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

OPERATIONS = (
    "memory_lookup",
    "gumbel_shrinkage",
    "masked_shortcut",
    "neighbourhood_attention",
    "inpaint_block",
)
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

    def is_compiled(self, selection: str, device: torch.device) -> bool:
        """Whether the compiled reference takes part: it costs up to a minute for each case."""
        sizes = dict(self.sizes)
        if selection == "core" and device.type == "cpu":
            return sizes["B"] == 16 and sizes.get("M", 200) == 200
        if selection == "core":
            return sizes["B"] in (16, 512, 4096) and sizes.get("M", 200) != 1000
        return selection == "all"


def _batches(device: torch.device, selection: str) -> tuple[int, ...]:
    if selection == "tiny":
        return (2,)
    return (1, 16, 64) if (device.type, selection) == ("cpu", "core") else (1, 16, 64, 512, 4096)


def _slots(device: torch.device, selection: str) -> tuple[int, ...]:
    if selection == "tiny":
        return (7,)
    return (200, 1000) if (device.type, selection) == ("cpu", "core") else (200, 1000, 10_000)


def _is_extra(operation: str, device: torch.device, B: int, M: int) -> bool:
    """What would cost the most time for the least news."""
    if device.type == "cpu":
        return operation == "inpaint_block" and M != 200
    return M == 1000 and B not in (16, 512)


def _sizes(operation: str, device: torch.device, selection: str) -> Iterator[dict[str, Any]]:
    tiny = selection == "tiny"
    C = 128 if tiny else 2048
    for B in _batches(device, selection):
        if operation in ("memory_lookup", "gumbel_shrinkage", "inpaint_block"):
            for M in _slots(device, selection):
                if selection == "core" and _is_extra(operation, device, B, M):
                    continue
                sizes = {"B": B, "N": 4, "M": M, "C": C, "k": 5}
                if operation == "gumbel_shrinkage":
                    del sizes["C"]
                if operation == "inpaint_block":
                    sizes["width"] = 32 if tiny else 512
                yield sizes
        elif operation == "masked_shortcut":
            sizes = {"B": B, "N": 4, "C": 32 if tiny else 512, "side": 4}
            for layout, affine in (
                ("contiguous", False),
                ("channels_last", False),
                ("channels_last", True),
            ):
                yield sizes | {"layout": layout, "affine": affine}
        else:
            yield {"B": B, "N": 4, "C": C}
            yield {"B": B, "N": 9, "C": C // 2}


def cases(device: torch.device, selection: str = "core") -> list[Case]:
    """All cases of a selection ("tiny", "core" or "all") on a device."""
    found = []
    for operation in OPERATIONS:
        with_slots = operation == "memory_lookup"
        directions = DIRECTIONS if with_slots else DIRECTIONS[:2]
        dtypes = ("bfloat16", "float32") if device.type == "cuda" else ("float32",)
        for dtype, direction in itertools.product(dtypes, directions):
            for sizes in _sizes(operation, device, selection):
                few = (dtype, selection, device.type) == ("float32", "core", "cuda")
                if few and (sizes["B"] not in (16, 512) or sizes.get("M") == 1000):
                    continue
                found.append(Case(operation, direction, dtype, tuple(sizes.items())))
    return found


def schedule(device: torch.device, selection: str) -> list[tuple[Case, str]]:
    """Cases with their contenders; the compiled ones, which are slow to prepare, come last."""
    every = cases(device, selection)
    plan = [(case, contender) for case in every for contender in CONTENDERS[:2]]
    return plan + [(c, "compiled") for c in every if c.is_compiled(selection, device)]
