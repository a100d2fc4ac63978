"""Which values of images the networks take."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

VALUE_RANGE = (0.0, 1.0)
"""Range of the pixels that the networks learn from and reconstruct."""

TOLERANCE = 1e-3
"""By how much pixels may lie outside, since resizing rounds: one step of float16 above 1, and a
quarter of a step of an 8-bit image."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_values(
    images: Tensor,
    value_range: tuple[float, float] = VALUE_RANGE,
    training: bool = False,
    nan_passes: bool = False,
) -> None:
    """Raise ValueError unless the values of images [B, ...] are finite and within the range.

    The values are not read while compiling or capturing, nor in training on a GPU, where reading
    them would stall every step.
    """
    if torch.compiler.is_compiling() or images.is_meta or not images.numel():
        return
    if images.is_cuda and (training or torch.cuda.is_current_stream_capturing()):
        return
    images = images.detach()
    while is_functorch_wrapped_tensor(images):  # under vmap, where no value can be read
        images = get_unwrapped(images)
    low, high = torch.stack(images.aminmax()).tolist()  # both NaN if any value is
    if _fit(low, high, value_range) or (nan_passes and math.isnan(low)):
        return
    refuse_values(*images.flatten(1).aminmax(dim=1), value_range)


def check_tensor(
    images: object, value_range: tuple[float, float] = VALUE_RANGE, bytes_fit: bool = False
) -> None:
    """Raise ValueError unless images are a dense tensor of floats or, where they fit, bytes."""
    fitting = f"floating-point values in {_shown(value_range)}"
    if bytes_fit:
        fitting += ", or uint8, of which 255 is 1,"
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images are of the type {type(images).__name__}; a tensor of {fitting} fits."
        )
    if images.layout is not torch.strided or images.is_nested:
        raise ValueError("images are a sparse or nested tensor; a dense one would fit.")
    if images.dtype not in (*_FLOATS, *([torch.uint8] if bytes_fit else [])):
        raise ValueError(f"images are {images.dtype}; {fitting} fit.")


def check_precision(images: Tensor, module: nn.Module) -> None:
    """Raise ValueError if images are of another dtype than weights, unless autocast casts both."""
    weight = next(module.parameters())
    if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise ValueError(
            f"images are {images.dtype} and the weights {weight.dtype}; "
            f"images.to({weight.dtype}) would fit."
        )


def refuse_values(
    lowest: Tensor, highest: Tensor, value_range: tuple[float, float] = VALUE_RANGE
) -> None:
    """Raise ValueError if the smallest and greatest values [B] of some images do not fit."""
    pairs = list(zip(lowest.tolist(), highest.tolist(), strict=True))
    bad = [pair for pair in pairs if not _fit(*pair, value_range)]
    if not bad:
        return
    odd = [pair for pair in pairs if not all(map(math.isfinite, pair))]
    if odd:
        raise ValueError(
            f"{len(odd)} of {len(pairs)} images hold NaN or infinite values; values in "
            f"{_shown(value_range)} fit."
        )
    low, high = min(low for low, _ in pairs), max(high for _, high in pairs)
    raise ValueError(
        f"{len(bad)} of {len(pairs)} images hold values outside {_shown(value_range)}: the "
        f"smallest is {low:g}, the greatest is {high:g}; {_advice(low, high, value_range)}."
    )


def _fit(low: float, high: float, value_range: tuple[float, float]) -> bool:
    """Whether values from ``low`` to ``high`` lie within the range; NaN does not."""
    return low >= value_range[0] - TOLERANCE and high <= value_range[1] + TOLERANCE


def _advice(low: float, high: float, value_range: tuple[float, float]) -> str:
    """What images with such values need, guessed from the ranges that are common elsewhere."""
    to = _shown(value_range)
    if low >= -0.25 and high <= 1.25:
        return f"if a bicubic resize overshot, clamp them to {to}"
    if low >= -1 and high <= 1:
        return f"if they were scaled to [-1, 1], scale them to {to}"
    if low >= -TOLERANCE and high <= 256:
        return "divide by 255, or give uint8 to a Scorer, which takes bytes as they are"
    if low >= -TOLERANCE:
        return f"divide by the greatest value that they can have, such as 4095 or 65535, for {to}"
    if low >= -10 and high <= 10:
        return f"if they were normalised by mean and deviation, leave that out and keep {to}"
    return f"map Hounsfield units or other values to {to} by a window, and clamp what lies outside"


def _shown(value_range: tuple[float, float]) -> str:
    low, high = value_range
    return f"[{low:g}, {high:g}]"
