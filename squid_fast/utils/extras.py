"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which comes with the optional dependency group ``extra``.

    Raises:
        ImportError: ``module`` is not installed; the message names the group to install.

    >>> require("json", "train").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise  # the module is installed, but something that it imports is not
        raise ImportError(
            f"{module} is not installed; it comes with the extra '{extra}': "
            f'pip install "squid-fast[{extra}]"'
        ) from error
