"""Checkpoints: what a run needs to be resumed; a crash while saving keeps the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..presets import current_names
from ..utils.atomic import replacing
from ..utils.checkpoints import MissingError, UnreadableError, read_tensors
from ..utils.outputs import check_folder
from ..utils.text import shown

CHECKPOINT = "checkpoint.pt"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another run."""


def check_run_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that a run cannot be written to, before any work is done.

    Raises:
        CheckpointError: it already holds a run, which is not to be resumed, or the model of one; or
            it holds none to resume.
        OSError: it is a file, or cannot be written to.

    >>> check_run_folder(Path("run"), resume=True)
    Traceback (most recent call last):
    squid_fast.training.checkpoint.CheckpointError: there is no checkpoint at run/checkpoint.pt; ...
    """
    check_folder(out)
    if resume and not (out / CHECKPOINT).exists():
        raise CheckpointError(
            f"there is no checkpoint at {shown(out / CHECKPOINT)}; leave out --resume."
        )
    for name, what in ((CHECKPOINT, "run"), ("config.json", "model")):
        if (out / name).exists() and not resume:
            hint = "add --resume to go on with it, or " if name == CHECKPOINT else ""
            raise CheckpointError(
                f"{shown(out)} already holds a {what}; {hint}choose another folder."
            )


def prepare_folder(out: Path, resume: bool) -> None:
    """Create the folder of a run; raises as ``check_run_folder`` does."""
    check_run_folder(out, resume)
    out.mkdir(parents=True, exist_ok=True)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` to ``path``, which holds the old file until the new one is complete."""
    with replacing(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values are read, no code is run.

    Raises:
        CheckpointError: there is no such file, or it is not a checkpoint of squid-fast.
    """
    try:
        state = read_tensors(path)
    except MissingError:
        raise CheckpointError(
            f"there is no checkpoint at {shown(path)}; leave out --resume."
        ) from None
    except UnreadableError as error:
        raise CheckpointError(
            f"{shown(path)} cannot be read as a checkpoint: {error}. Without --resume, in another "
            "folder, training begins anew."
        ) from error
    if not isinstance(state, dict) or "step" not in state or "generator" not in state:
        raise CheckpointError(f"{shown(path)} is not a checkpoint written by squid-fast train.")
    return state


def upgrade(state: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Bring a checkpoint that an earlier version wrote into the present format.

    ``settings`` of the resumed run fill in what a baseline's checkpoint did not record.
    """
    saved = dict(state["settings"])
    if "method" in saved:  # baselines had a format of their own
        saved["model"] = settings["model"] | {"method": saved.pop("method")}
        saved["images_sha256"], saved["images"] = saved["images"], settings["images"]
        state = state | {"optimizers": [state["optimizer"]], "best": None}
    saved["recipe"] = current_names(saved["recipe"])
    absent = {"sums": {}, "validation": {}, "minutes": 0.0, "to_validate": False, "threads": None}
    return absent | state | {"settings": saved}
