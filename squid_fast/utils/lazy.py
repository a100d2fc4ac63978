"""Packages that import their names only when these are used (PEP 562).

Without this, ``import squid_fast.data.readers`` would load torch, which takes seconds: too long for
the processes that only read files.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping


def lazy_names(
    package: str, homes: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The functions ``__getattr__`` and ``__dir__`` for a package.

    ``homes`` gives names by the module of the package that defines them. The modules themselves
    become attributes as well, as if they had been imported.
    """
    home = {name: f"{package}.{module}" for module, names in homes.items() for name in names}

    def get(name: str) -> object:
        if name in home:
            value = getattr(importlib.import_module(home[name]), name)
            setattr(sys.modules[package], name, value)  # found without this function the next time
            return value
        module = f"{package}.{name}"
        if not name.startswith("_"):
            try:
                return importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise  # the module exists, but something that it imports does not
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        module = sys.modules[package]
        return sorted({*vars(module), *module.__all__})

    return get, names
