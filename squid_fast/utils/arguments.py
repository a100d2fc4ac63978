"""Checks of arguments, for functions whose work takes long."""

from __future__ import annotations

import json
from typing import Any


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise TypeError unless a value is of that type.

    >>> check_kind("recipe", {"epochs": 3}, int)
    Traceback (most recent call last):
    TypeError: recipe is of the type dict; it must be of the type int.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} is of the type {type(value).__name__}; it must be of the type {kind.__name__}."
        )


def is_number(value: object, whole: bool = False) -> bool:
    """Whether it is a Python number, which True and False are not here.

    >>> is_number(0.5), is_number(0.5, whole=True), is_number(True)
    (True, False, False)
    """
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def check_json(name: str, value: Any) -> None:
    """Raise ValueError unless a value can be written as a JSON object.

    >>> check_json("about", {"files": {1, 2}})
    Traceback (most recent call last):
    ValueError: about cannot be written as JSON: Object of type set is not JSON serializable.
    """
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}.") from None
