"""In which precision a scorer computes."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ..utils.devices import Backend, ScoringPrecision, choose_precision
from .compiler import lacking
from .quantization import has_int8
from .scores import Calibration

AGREEMENT = 0.999
"""Rank correlation with float32 from which on ``precision="auto"`` chooses int8."""


def can_use_int8(calibration: Calibration | None, device: torch.device) -> bool:
    """Whether a scorer with that calibration can compute in int8 on that device."""
    return bool(calibration and calibration.quantization) and device.type == "cpu" and has_int8()


def check_hardware(
    precision: ScoringPrecision, device: torch.device, backend: Backend = "eager"
) -> None:
    """Raise ValueError unless precision and backend are known and work on this machine.

    >>> check_hardware("float32", torch.device("cpu"))
    >>> check_hardware("int4", torch.device("cpu"))
    Traceback (most recent call last):
    ...
    ValueError: precision is 'int4'; it must be 'auto', 'int8', 'bf16' or 'float32'.
    """
    *others, last = map(repr, get_args(ScoringPrecision))
    if repr(precision) not in (*others, last):
        raise ValueError(f"precision is {precision!r}; it must be {', '.join(others)} or {last}.")
    if precision != "int8":
        choose_precision(precision, device)
    elif device.type != "cpu" or not has_int8():
        raise ValueError(
            "precision is 'int8', which needs a processor with int8 products (VNNI); "
            f"on this {device.type} 'auto' or 'float32' would fit."
        )
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; it must be 'eager' or 'compile'.")
    if backend == "compile" and precision == "int8":
        raise ValueError(
            "backend is 'compile', which knows no int8; with it precision 'auto', 'bf16' or "
            "'float32' would fit, and with precision 'int8' backend 'eager'."
        )
    missing = lacking(device) if backend == "compile" else None
    if missing is not None:
        raise ValueError(
            f"backend is 'compile', which needs {missing}, and this machine has none; 'eager' "
            "would fit."
        )


def choose_scoring_precision(
    precision: ScoringPrecision,
    device: torch.device,
    calibration: Calibration | None,
    score: str,
    backend: Backend = "eager",
) -> Literal["int8", "bf16", "float32"]:
    """The precision to compute in, where ``"auto"`` is resolved as described in ``Scorer``.

    ValueError if a name is unknown, or the machine or the calibration do not allow it.
    """
    check_hardware(precision, device, backend)
    able = can_use_int8(calibration, device) and backend == "eager"
    if precision == "int8" and not able:
        raise ValueError(
            "precision is 'int8', but the calibration holds no ranges for it: it is missing, or "
            "was made on a processor without VNNI. squid_fast.calibrate adds them on this machine; "
            "'bf16' and 'float32' need none."
        )
    known = calibration.quantization if calibration else None
    alike = known is not None and known.agreement.get(score, 0) >= AGREEMENT
    if precision == "int8" or (precision == "auto" and able and alike):
        return "int8"
    return choose_precision(precision, device)
