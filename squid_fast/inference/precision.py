"""In which precision a scorer computes."""

from __future__ import annotations

from typing import Literal

import torch

from ..utils.devices import ScoringPrecision, choose_precision
from .quantization import has_int8
from .scores import Calibration

AGREEMENT = 0.999
"""Rank correlation with float32 from which on 8-bit convolutions are used unasked."""


def can_use_int8(calibration: Calibration | None, device: torch.device) -> bool:
    """Whether a scorer with that calibration can be asked for int8 on that device."""
    return bool(calibration and calibration.quantization) and device.type == "cpu" and has_int8()


def check_hardware(precision: ScoringPrecision, device: torch.device) -> None:
    """Refuse a precision that the hardware does not compute in, before a model is loaded for it.

    Raises:
        ValueError: it does not, or another name.
    """
    if precision != "int8":
        choose_precision(precision, device)
    elif device.type != "cpu" or not has_int8():
        raise ValueError(
            "precision is 'int8', which needs a processor that multiplies bytes (VNNI); "
            f"on this {device.type} 'auto' or 'float32' would fit."
        )


def choose_scoring_precision(
    precision: ScoringPrecision,
    device: torch.device,
    calibration: Calibration | None,
    score: str,
) -> Literal["int8", "bf16", "float32"]:
    """The precision asked for, or that of ``"auto"``; see ``Scorer``.

    Raises:
        ValueError: another name, or it is not to be had here or with this calibration.
    """
    check_hardware(precision, device)
    if precision == "auto":
        known = calibration.quantization if calibration else None
        alike = known is not None and known.agreement.get(score, 0) >= AGREEMENT
        if alike and can_use_int8(calibration, device):
            return "int8"
        return choose_precision("auto", device)
    if precision != "int8":
        return choose_precision(precision, device)
    if not can_use_int8(calibration, device):
        raise ValueError(
            "precision is 'int8', but the calibration holds no ranges for it: it was made where "
            "there is no VNNI, or is missing. squid_fast.calibrate makes them here; 'bf16' and "
            "'float32' do without."
        )
    return "int8"
