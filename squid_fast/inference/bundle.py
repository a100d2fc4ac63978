"""A trained model on disk: one folder that holds all that scoring needs, and no code.

``model.safetensors`` and ``discriminator.safetensors`` hold the state dicts under the published
names (and the queue's position), ``config.json`` the constructor arguments and the score,
``calibration.json`` mean, deviation and threshold of every score.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modules import SQUID, Discriminator, MemoryQueue, discriminator_size
from ..modules.state import Network
from ..utils.atomic import replacing, write_json
from ..utils.checkpoints import (
    MissingError,
    State,
    UnreadableError,
    read_head,
    read_tensors,
    safetensors_bytes,
    state_dicts,
    tensors,
)
from ..utils.text import shown
from .scores import PAPER_SCORE, SCORES, Calibration

FORMAT = 1
_QUEUE_PTR = "inpaint_block.memory.ptr"


class BundleError(ValueError):
    """A folder or checkpoint cannot be loaded as a model; the message says why."""


@dataclass
class Bundle:
    """A trained pair with its calibration.

    Attributes:
        score: name of the score that screening uses, see ``squid_fast.inference.scores.SCORES``.
        about: facts for people, such as preset, recipe and machine.

    >>> model, discriminator = SQUID.from_preset("small"), Discriminator(2)
    >>> Bundle(model, discriminator, about={"preset": "small"}).score
    'discriminator_instance'
    """

    model: SQUID
    discriminator: Discriminator
    calibration: Calibration | None = None
    score: str = PAPER_SCORE
    about: dict[str, Any] = field(default_factory=dict)


def save_bundle(bundle: Bundle, folder: str | Path) -> None:
    """Write a bundle into a folder; each file is replaced whole or not at all.

    >>> save_bundle(Bundle(SQUID.from_preset("small"), Discriminator(2)), "model")
    >>> sorted(path.name for path in Path("model").iterdir())
    ['config.json', 'discriminator.safetensors', 'model.safetensors']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "model": bundle.model.config,
        "discriminator": {"size": bundle.discriminator.size},
        "image_size": bundle.model.image_size,
        "score": bundle.score,
        "about": bundle.about,
    }
    state = bundle.model.state_dict()
    queue = getattr(bundle.model.inpaint_block, "memory", None)
    if isinstance(queue, MemoryQueue):
        state[_QUEUE_PTR] = queue.ptr
    save_weights(state, folder / "model.safetensors")
    save_weights(bundle.discriminator.state_dict(), folder / "discriminator.safetensors")
    write_json(config, folder / "config.json")
    if bundle.calibration is not None:
        write_json(bundle.calibration.to_json(), folder / "calibration.json")


def load_bundle(folder: str | Path) -> Bundle:
    """Read a bundle onto the CPU, in evaluation mode.

    Raises:
        BundleError: a file is missing, damaged or does not fit the others.

    >>> save_bundle(Bundle(SQUID.from_preset("small"), Discriminator(2)), "model")
    >>> bundle = load_bundle("model")
    >>> bundle.model.image_size, bundle.model.training
    (48, False)
    """
    folder = Path(folder)
    if not _is_folder(folder):
        raise BundleError(
            f"{shown(folder)} is not a folder; a bundle is the folder that training wrote."
        )
    config = read_json(folder / "config.json")
    if config.get("format") != FORMAT:
        raise BundleError(
            f"{shown(folder / 'config.json')} has format {config.get('format')!r}; this version of "
            f"squid_fast reads format {FORMAT}."
        )
    if "method" in config:
        raise BundleError(
            f"{shown(folder)} holds a {config['method']!r}, not SQUID; "
            "squid_fast.experiments.baselines.load_scorer reads it."
        )
    try:
        with torch.device("cpu"):  # whatever the default is
            model = SQUID(**config["model"])
            discriminator = Discriminator(**config["discriminator"])
        score, about = config["score"], config.get("about", {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"{shown(folder / 'config.json')} does not describe a model: {_lack(error)}."
        ) from error
    if score not in SCORES:
        raise BundleError(
            f"{shown(folder / 'config.json')} names the unknown score {score!r}; known are "
            f"{', '.join(SCORES)}."
        )
    _load_weights(model, folder / "model.safetensors")
    _load_weights(discriminator, folder / "discriminator.safetensors")
    calibration, path = None, folder / "calibration.json"
    if path.exists():
        try:
            calibration = Calibration.from_json(read_json(path))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{shown(path)} is damaged: {_lack(error)}.") from error
    return Bundle(model.eval(), discriminator.eval(), calibration, score, about)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError:
        raise BundleError(f"{shown(path)} may not be read, for lack of permission.") from None
    except (OSError, ValueError):
        return False


def load_published(
    generator: str | Path, discriminator: str | Path, model: dict[str, Any]
) -> tuple[SQUID, Discriminator]:
    """Read a pair of published ``.pth`` checkpoints into models of a configuration of ``SQUID``.

    The files are read as plain tensors; one that holds anything else is refused, not run.

    Raises:
        BundleError: a file cannot be read so, or its weights do not fit the configuration.
    """
    try:
        with torch.device("cpu"):  # whatever the default is
            squid = SQUID(**model)
            pair = squid, Discriminator(discriminator_size(squid.image_size))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"the configuration describes no model: {_lack(error)}.") from error
    for module, path in zip(pair, map(Path, (generator, discriminator)), strict=True):
        try:
            found = read_tensors(path)
        except UnreadableError as error:
            raise BundleError(
                f"{shown(path)} cannot be read as a checkpoint of plain tensors: {error}."
            ) from error
        _load(module, found, path)
    return pair[0].eval(), pair[1].eval()


def _load(module: Network, found: object, path: Path) -> None:
    """Load a module from what a file holds, which may wrap its state dict."""
    state, where = _state_dict(module, found, path), shown(path)
    for name, own in module.state_dict().items():
        if name in state and own.is_floating_point() and not state[name].is_floating_point():
            raise BundleError(
                f"{where} holds {state[name].dtype} in {name!r}; floating-point weights would fit."
            )
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        why = module.misfit(state) or error
        raise BundleError(f"the weights in {where} do not fit the configuration: {why}.") from None
    if bad := [name for name, value in state.items() if not bool(value.float().isfinite().all())]:
        raise BundleError(f"{where} holds NaN or infinite weights in {', '.join(bad[:3])}.")


def _state_dict(module: Network, found: object, path: Path) -> State:
    """The one state dict of such a module that a checkpoint holds."""
    where = shown(path)
    if not isinstance(found, Mapping):
        raise BundleError(f"{where} holds no state dict; a dictionary of tensors would fit.")
    if found.keys() >= {"step", "settings", "generator", "optimizers"}:
        raise BundleError(
            f"{where} is the checkpoint of a run of squid-fast train, which --resume goes on with; "
            "the run's folder is a model as soon as the run has ended."
        )
    flat = tensors(found)
    held = state_dicts(flat, next(iter(module.state_dict())))
    if len(held) > 1:
        raise BundleError(
            f"{where} holds several models, {', '.join(map(repr, held))}; save the state dict of "
            "one of them by itself."
        )
    return next(iter(held.values()), flat)


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; the file is replaced whole or not at all."""
    with replacing(path) as file:  # save_file would leave it readable to its owner alone
        file.write(safetensors_bytes(state))


def _load_weights(module: Network, path: Path) -> None:
    try:
        found = read_tensors(path)
    except MissingError:
        raise BundleError(f"{shown(path)} is missing from the bundle.") from None
    except UnreadableError as error:
        raise BundleError(f"{shown(path)} cannot be read as safetensors: {error}.") from error
    _load(module, found, path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a bundle; BundleError if it is missing or holds none."""
    try:
        read_head(path)
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except MissingError:
        raise BundleError(f"{shown(path)} is missing; the folder is not a bundle.") from None
    except UnreadableError as error:
        raise BundleError(f"{shown(path)} cannot be read: {error}.") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{shown(path)} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BundleError(f"{shown(path)} holds no JSON object.")
    return value


def _lack(error: Exception) -> str:
    """What is wrong with the arguments of a constructor that a file gave."""
    text = str(error)
    if isinstance(error, KeyError):
        return f"it lacks {text}"
    if isinstance(error, ValueError):
        return text.removesuffix(".")
    if names := re.search(r"missing \d+ required .* arguments?: (.*)", text):
        return f"it lacks {names[1]}"
    if name := re.search(r"unexpected keyword argument (.*)", text):
        return f"this version of squid_fast does not know its {name[1]}"
    return "its parts have other types than squid_fast writes"
