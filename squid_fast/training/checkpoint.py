"""Checkpoints: everything a run needs to go on, written so that a crash leaves the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..utils.atomic import replacing


class CheckpointError(ValueError):
    """A checkpoint cannot be read or belongs to another run."""


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` to ``path``; readers see the old file or the whole new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; tensors and plain values only, no code is run.

    Raises:
        CheckpointError: there is none, or it is no checkpoint of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at {path}; leave out --resume.") from None
    except Exception as error:  # the unpickler raises many kinds
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(state, dict) or "step" not in state or "generator" not in state:
        raise CheckpointError(f"{path} is not a checkpoint written by squid-fast train.")
    return state
