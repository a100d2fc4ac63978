"""Triton's interpreter, which here remembers what it would work out anew at every operation.

A kernel's test spends nearly all of its time on the interpreter's own bookkeeping, and most of that
on the same answers again: at every launch, and at every call of a device function, it looks through
``triton.language`` for what to replace, and for every result it makes up the type and the shape.
These depend on their arguments only. Sums and products of integers it computes a second time, to
see whether they overflow, and says so in debug mode only, which is off. What kernels compute and
what is refused is the same as before: see test_interpreter.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import triton
from triton import language as tl
from triton.language import core
from triton.runtime import interpreter

# What is replaced is this version's own affair. With another, tests take three times as long.
VERSION = "3.7.1"

# The scopes of the replacements in triton.language, by the globals of a kernel's module.
scopes: dict[int, Any] = {}


def patch_once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the language's functions for a module's kernels once, until ``remembering`` ends."""

    def patch_lang(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module not in scopes:
            scopes[module] = patch(fn)
        return interpreter._LangPatchScope()  # nothing for a launch to restore

    return patch_lang


def numpy_dtype_once(find: Callable[..., Any]) -> Callable[..., Any]:
    """NumPy's dtype for one of Triton's, by its name."""
    known: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    return get_np_dtype


def block_type_once(init: Callable[..., None]) -> Callable[..., None]:
    """What there is to know of a block's type, by the type of its elements and its shape."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def __init__(self: Any, element_ty: Any, shape: Any) -> None:  # noqa: N807
        sizes = [size.value if isinstance(size, tl.constexpr) else size for size in shape]
        key = (element_ty.name, *sizes)
        if key not in known:
            init(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key], element_ty=element_ty)

    return __init__


def shape_once(init: Callable[..., None]) -> Callable[..., None]:
    """A tensor's shape and number of elements, by its type."""
    known: dict[str, tuple[Any, Any]] = {}

    def __init__(self: Any, handle: Any, type: Any) -> None:  # noqa: N807
        if type.name not in known:
            init(self, handle, type)
            known[type.name] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known[type.name]

    return __init__


def without_unsaid_checks(options: Any) -> Any:
    """No search for overflows that nobody is told of."""
    return replace(options, sanitize_overflow=options.sanitize_overflow and options.debug)


@cache
def replacements() -> list[tuple[Any, str, Any, Any]]:
    """Owner, name, original and substitute; none for compiled kernels or another Triton."""
    if os.environ.get("TRITON_INTERPRET") != "1" or triton.__version__ != VERSION:
        return []
    return [
        (owner, name, getattr(owner, name), once(getattr(owner, name)))
        for owner, name, once in (
            (interpreter, "_patch_lang", patch_once),
            (interpreter, "_get_np_dtype", numpy_dtype_once),
            (core.block_type, "__init__", block_type_once),
            (core.tensor, "__init__", shape_once),
            (interpreter.interpreter_builder, "options", without_unsaid_checks),
        )
    ]


@contextmanager
def remembering(on: bool = True) -> Iterator[None]:
    """The interpreter remembers inside; if not ``on``, it is as it was published."""
    restore_language()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, published, quick in replacements():
            patch.setattr(owner, name, quick if on else published)
        try:
            yield
        finally:
            restore_language()


def restore_language() -> None:
    """Leave ``triton.language`` as its authors wrote it."""
    while scopes:
        scopes.popitem()[1].restore()  # the last one first
