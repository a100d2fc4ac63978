"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which comes with the optional dependency group ``extra``.

    Raises:
        ImportError: it is not installed; the message names the group that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise  # the module is there, something that it needs itself is not
        raise ImportError(
            f"{module} is not installed; it comes with the '{extra}' extra: "
            f'pip install "squid-fast[{extra}]"'
        ) from error
