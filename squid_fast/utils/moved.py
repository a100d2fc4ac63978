"""Import paths of earlier versions, which still work with a ``DeprecationWarning``."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

MOVED = {
    f"squid_fast.{old}": f"squid_fast.{new}"
    for old, new in {
        "ablation": "experiments.ablation",
        "atomic": "utils.atomic",
        "benchmark": "experiments.benchmark",
        "bundle": "inference.bundle",
        "comparison": "experiments.baselines",
        "console": "cli.console",
        "data.digit_anatomy": "data.synthetic.digit_anatomy",
        "data.digit_files": "data.synthetic.digit_files",
        "data.handwriting": "data.synthetic.handwriting",
        "demo": "experiments.demo",
        "devices": "utils.devices",
        "diagnostics": "experiments.diagnostics",
        "evaluation": "metrics",
        "inference.other_scores": "experiments.research_scores",
        "kernels.choice": "kernels.dispatch",
        "machine": "utils.machine",
        "ops.shrinkage": "ops.lookup",
        "published": "experiments.published",
        "scores": "inference.scores",
        "screening.files": "screening.reading.files",
        "screening.journal_format": "screening.journal",
        "screening.lists": "screening.reading.lists",
        "screening.packing": "screening.reading.packing",
        "screening.summary": "screening.report.summary",
        "threads": "utils.threads",
        "training.contamination": "data.contamination",
    }.items()
}


class _FormerPaths:
    """Finds modules by their former paths, and loads those of today in their place.

    Without the base classes of ``importlib.abc``, which do nothing here and take long to import.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("squid_fast."):  # asked for every import of every library
            return None
        for old, new in MOVED.items():
            if f"{name}.".startswith(f"{old}."):
                loader: Any = self
                return ModuleSpec(name, loader, loader_state=new + name[len(old) :])
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {spec.loader_state}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(spec.loader_state)
        spec.loader_state = module.__spec__  # in place of which importlib puts the former path's
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


_FORMER_PATHS = _FormerPaths()


def accept_old_paths() -> None:
    """Make former import paths work."""
    if _FORMER_PATHS not in sys.meta_path:
        sys.meta_path.insert(0, _FORMER_PATHS)


def moved_names(
    package: str, homes: Mapping[str, str], others: Callable[[str], object] | None = None
) -> Callable[[str], object]:
    """The ``__getattr__`` of a package; ``homes`` gives the full present names by former name.

    Names that are not among these are given to ``others``, such as that of ``lazy_names``.
    """

    def get(name: str) -> object:
        if name not in homes:
            if others:
                return others(name)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(f"{package}.{name} is now {homes[name]}", DeprecationWarning, stacklevel=2)
        module, _, attribute = homes[name].rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    return get


def renamed_field(old: str, new: str) -> Callable[[Class], Class]:
    """Decorate a dataclass whose field ``new`` is still accepted and read under its old name."""

    def decorate(cls: Class) -> Class:
        message = f"{cls.__name__}.{old} is now {new}"
        initialise = cls.__init__  # type: ignore[misc]  # of this class alone

        @functools.wraps(initialise)
        def renaming(self: Any, *arguments: Any, **named: Any) -> None:
            if old in named:
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                named[new] = named.pop(old)
            initialise(self, *arguments, **named)

        def read(self: Any) -> Any:
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return getattr(self, new)

        cls.__init__ = renaming  # type: ignore[misc]
        setattr(cls, old, property(read))
        return cls

    return decorate
