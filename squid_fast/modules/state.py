"""What the networks have in common: how they load state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..utils.checkpoints import without_wrappers

_COUNTERS = "num_batches_tracked"  # which are in no state dict before PyTorch 0.4.1


class Network(nn.Module):
    """A module that loads the state dicts of its wrappers too, and says in short why it cannot."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of ``nn.Module``; names of wrappers such as ``module`` or ``_orig_mod`` are left out.

        Raises:
            RuntimeError: the state dict does not fit.
            TypeError: it is no dictionary with names as keys.
        """
        given: object = state_dict
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise TypeError(
                f"the state dict is of the type {type(given).__name__}; a dictionary of "
                "tensors by name would fit, such as torch.load(path) gives."
            )
        state = without_wrappers(state_dict)
        try:
            return super().load_state_dict(state, strict, assign)
        except RuntimeError as error:
            why = self.misfit(state) or str(error)
        raise RuntimeError(f"the state dict does not fit this {type(self).__name__}: {why}")

    def misfit(self, state: Mapping[str, Any]) -> str:
        """Two sentences on how a state dict differs from this module's, and what it would fit."""
        own = self.state_dict()
        if void := [k for k in own if k in state and not _has_values(state[k], own[k])]:
            said = "1 is no tensor" if len(void) == 1 else f"{len(void)} are no tensors"
            return f"{said} with values ({_first(void)})"
        said = differences(own, state)
        if not said:
            return ""
        advice = self.fitting(state)
        for name, inner in state.items():
            if isinstance(inner, Mapping) and not differences(own, without_wrappers(inner)):
                advice = f"Its entry {name!r} would fit"
        return ". ".join(text for text in (said, advice) if text)

    def fitting(self, state: Mapping[str, Any]) -> str:
        """What a state dict that does not fit would fit; empty if that is unknown."""
        return ""


def differences(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """How the names and shapes of a state dict differ from a module's own; empty if they do not.

    >>> import torch
    >>> differences({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(3)})
    "1 entry is missing ('b'); 1 has another shape ('a': [3] in place of [2])"
    """
    said = []
    if missing := [k for k in own if k not in state and not k.endswith(_COUNTERS)]:
        verb = "entry is" if len(missing) == 1 else "entries are"
        said.append(f"{len(missing)} {verb} missing ({_first(missing)})")
    if unknown := [k for k in state if k not in own and not k.endswith(".ptr")]:
        said.append(f"{len(unknown)} {_verb(unknown)} unknown ({_first(unknown)})")
    other = [
        f"{name!r}: {list(state[name].shape)} in place of {list(own[name].shape)}"
        for name in own
        if isinstance(state.get(name), Tensor) and state[name].shape != own[name].shape
    ]
    if other:
        verb, more = ("has", "") if len(other) == 1 else ("have", ", ...")
        said.append(f"{len(other)} {verb} another shape ({other[0]}{more})")
    return "; ".join(said)


def _has_values(value: object, own: Tensor) -> bool:
    """Whether it is a tensor, and on the meta device only if the module's own is."""
    return isinstance(value, Tensor) and (own.is_meta or not value.is_meta)


def _verb(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _first(names: list[str]) -> str:
    return repr(names[0]) + (", ..." if len(names) > 1 else "")
