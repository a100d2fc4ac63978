"""Files of tensors and state dicts as people have them: copied, downloaded, of wrapped modules."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

_HEAD = 512  # bytes
_WRAPPERS = {
    "module",  # DataParallel, DistributedDataParallel, AveragedModel
    "_orig_mod",  # torch.compile
    "_forward_module", "_original_module",  # Lightning Fabric
    "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
}  # fmt: skip
_OF_WRAPPERS = ("n_averaged",)  # an entry of AveragedModel
_CHECKSUM = "crc32"  # of all tensors, in the metadata of a safetensors file

State = Mapping[str, Any]


class UnreadableError(ValueError):
    """A file cannot be read. The message is a clause that says why, and what would help."""


class MissingError(UnreadableError):
    """There is no such file."""


def read_tensors(path: Path) -> object:
    """What ``torch.save`` or safetensors wrote into a file, on the CPU; its content says which.

    Tensors and plain values are read, no code is run.

    Raises:
        UnreadableError: anything else.

    >>> torch.save({"weight": torch.ones(2)}, "weights.pth")
    >>> read_tensors(Path("weights.pth"))
    {'weight': tensor([1., 1.])}
    """
    head = read_head(path)
    try:
        if head[8:9] == b"{":  # behind the length of the header
            return _safetensors(path)
        if head.startswith(b"PK"):
            _check_archive(path)
        with open(path, "rb") as file:  # whose suffix says nothing
            return torch.load(file, map_location="cpu", weights_only=True)
    except UnreadableError:
        raise
    except SafetensorError:
        reason = "it is cut short or damaged; copy or download it again"
    except Exception as error:  # the unpickler raises many kinds
        reason = _reason(str(error))
    raise UnreadableError(reason)


def safetensors_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Tensors as a file of safetensors, with a checksum, which the format itself has not."""
    # The memories are slices of one tensor and convolutions may be channels-last; the format wants
    # each tensor to stand alone and contiguous.
    layout = torch.contiguous_format
    plain = {key: value.detach().cpu().clone(memory_format=layout) for key, value in state.items()}
    return save(plain, {_CHECKSUM: _checksum(plain)})


def _safetensors(path: Path) -> dict[str, Tensor]:
    state = load_file(path)
    with safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get(_CHECKSUM)
    if written is not None and written != _checksum(state):
        raise UnreadableError("it is damaged; copy or download it again")
    return state


def _checksum(state: Mapping[str, Tensor]) -> str:
    value = 0
    for _, tensor in sorted(state.items()):
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def read_head(path: Path) -> bytes:
    """The first bytes of a file that is not evidently something else than what its name says.

    Raises:
        UnreadableError: it cannot be opened, is empty, a pointer of Git LFS or a web page.
    """
    if os.path.isdir(path):  # Windows speaks of permission
        raise UnreadableError("it is a folder; a file in it would fit")
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except FileNotFoundError:
        raise MissingError("it is missing") from None
    except PermissionError:
        raise UnreadableError("it may not be read, for lack of permission") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableError(f"the system says {reason.lower()!r}") from None
    if not head:
        raise UnreadableError("it is empty; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UnreadableError("it is a pointer of Git LFS; `git lfs pull` fetches the file itself")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise UnreadableError("it is a web page; download the file itself")
    return head


def _check_archive(path: Path) -> None:
    """Raise UnreadableError unless a zip archive is whole and what ``torch.save`` makes.

    ``torch.load`` does not look at the checksums, which takes half the time that loading does.
    """
    if not zipfile.is_zipfile(path):
        raise UnreadableError("it is cut short; copy or download it again")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist() or [zipfile.ZipInfo("nothing")]
        if not any(part.filename.endswith("/data.pkl") for part in parts):
            raise UnreadableError(
                f"it is an archive of other things ({parts[0].filename!r}, ...); the file of "
                "torch.save(model.state_dict(), path) would fit"
            )
        written = any(part.CRC for part in parts)  # torch.serialization.set_crc32_options
        if written and archive.testzip() is not None:
            raise UnreadableError("it is damaged; copy or download it again")


def _reason(error: str) -> str:
    """What an error of ``torch.load`` means."""
    if "TorchScript" in error:
        return "it is a TorchScript program; the file of torch.save(model.state_dict()) would fit"
    if code := re.search(r"(?:GLOBAL|class) ([\w.]+)", error):
        return (
            f"it holds more than tensors ({code[1]}), and to read that could run code; "
            "where it was made, save the weights alone, by torch.save(model.state_dict(), path)"
        )
    return "it is damaged, or was not written by torch.save(model.state_dict(), path)"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, without those that wrap it.

    >>> layer = nn.Linear(2, 1)
    >>> unwrapped(nn.DataParallel(layer)) is layer
    True
    """
    inner = [getattr(module, name, None) for name in _WRAPPERS]
    found = [value for value in inner if isinstance(value, nn.Module)]
    return unwrapped(found[0]) if found else module


def plain_name(name: str) -> str:
    """The name of an entry without those of modules that wrapped a model or parts of it.

    >>> plain_name("module._orig_mod.down_blocks._orig_mod.0.weight")
    'down_blocks.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def without_wrappers(state: State) -> State:
    """A state dict with plain names; the same one if they are plain, or would coincide."""
    plain = {name: plain_name(str(name)) for name in state}
    if all(name == own for name, own in plain.items()) or len({*plain.values()}) < len(plain):
        return state
    found = OrderedDict((plain[name], value) for name, value in state.items())
    for name in _OF_WRAPPERS:
        found.pop(name, None)
    if (metadata := getattr(state, "_metadata", None)) is not None:
        own = {plain_name(name): value for name, value in metadata.items()}
        found._metadata = own  # type: ignore[attr-defined]
    return found


def tensors(found: object) -> State:
    """All tensors of a checkpoint, dense, by the names of what holds them and by their own.

    >>> found = {"epoch": 3, "state_dict": {"module.net.weight": torch.ones(2)}}
    >>> dict(tensors(found))
    {'state_dict.net.weight': tensor([1., 1.])}
    """
    flat: OrderedDict[str, Any] = OrderedDict()
    metadata: dict[str, Any] = {}
    for name, value in _leaves(found, metadata):
        if isinstance(value, Tensor):
            flat[name] = value if value.layout is torch.strided else value.to_dense()
    flat._metadata = metadata  # type: ignore[attr-defined]
    return without_wrappers(flat)


def state_dicts(flat: State, entry: str) -> dict[str, State]:
    """The state dicts with an entry of that name in ``tensors``, by the names of their holders.

    >>> flat = {"state_dict.net.weight": torch.ones(2), "state_dict.net.bias": torch.ones(1)}
    >>> {holder: list(state) for holder, state in state_dicts(flat, "weight").items()}
    {'state_dict.net': ['weight', 'bias']}
    """
    holders = [name[: -len(entry)] for name in flat if f".{name}".endswith(f".{entry}")]
    return {holder.removesuffix("."): _part(flat, holder) for holder in holders}


def _leaves(value: object, metadata: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dictionaries hold, by the names on the way to it; their metadata is added."""
    if not isinstance(value, Mapping):
        yield prefix.removesuffix("."), value
        return
    for name, known in getattr(value, "_metadata", {}).items():
        metadata[f"{prefix}{name}".removesuffix(".")] = known
    for name, inner in value.items():
        yield from _leaves(inner, metadata, f"{prefix}{name}.")


def _part(flat: State, holder: str) -> State:
    """The entries of a holder, whose name ends in a dot, by their own names."""

    def of(values: State) -> dict[str, Any]:
        inside = {
            f"{k}."[len(holder) :]: v for k, v in values.items() if f"{k}.".startswith(holder)
        }
        return {name.removesuffix("."): value for name, value in inside.items()}

    found = OrderedDict(of(flat))
    found._metadata = of(getattr(flat, "_metadata", {}))  # type: ignore[attr-defined]
    return found
