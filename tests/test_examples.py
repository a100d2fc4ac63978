"""The examples of docstrings: they run, and every public function and class has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

import squid_fast

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Not imported here: a command, and what needs packages of its own.
APART = ("squid_fast.__main__", "squid_fast.kernels", "squid_fast.screening.ray")

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(squid_fast.__path__, "squid_fast.", lambda name: None)
    if not found.name.startswith(APART)
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        if test.examples:
            torch.manual_seed(0)
            said: list[str] = []
            doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
            assert not said, "".join(said)


def public() -> list[tuple[str, object]]:
    """Functions and classes, but for errors, that a package names in its ``__all__``."""
    found = {}
    for name in ("squid_fast", *MODULES):
        module = importlib.import_module(name)
        for public_name in getattr(module, "__all__", ()):
            value = getattr(module, public_name)
            error = inspect.isclass(value) and issubclass(value, BaseException)
            if (inspect.isclass(value) or inspect.isfunction(value)) and not error:
                found[f"{value.__module__}.{public_name}"] = value
    return sorted(found.items())


@pytest.mark.parametrize(("name", "value"), public(), ids=lambda x: x if isinstance(x, str) else "")
def test_every_public_name_has_an_example(name: str, value: object) -> None:
    assert ">>>" in (inspect.getdoc(value) or ""), f"the docstring of {name} has no example"
