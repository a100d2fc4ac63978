"""Checkpoints: everything a run needs to go on, written so that a crash leaves the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..presets import current_names
from ..utils.atomic import replacing

CHECKPOINT = "checkpoint.pt"


class CheckpointError(ValueError):
    """A checkpoint cannot be read or belongs to another run."""


def prepare_folder(out: Path, resume: bool) -> None:
    """Create the folder of a run.

    Raises:
        CheckpointError: it already holds a run, which is not to be resumed.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not resume and (out / CHECKPOINT).exists():
        raise CheckpointError(
            f"{out} already holds a run; add --resume to go on with it, or choose another folder."
        )


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


def upgrade(state: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of an earlier version as this one writes it.

    Args:
        settings: of the run that goes on, for what a baseline's checkpoint did not record.
    """
    saved = dict(state["settings"])
    if "method" in saved:  # of a baseline, when these had a format of their own
        saved["model"] = settings["model"] | {"method": saved.pop("method")}
        saved["images_sha256"], saved["images"] = saved["images"], settings["images"]
        state = state | {"optimizers": [state["optimizer"]], "best": None}
    saved["recipe"] = current_names(saved["recipe"])
    absent = {"sums": {}, "validation": {}, "minutes": 0.0, "to_validate": False, "threads": None}
    return absent | state | {"settings": saved}
