"""The masked shortcut: operator, PyTorch implementation, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import dispatch
from .common import kernels, operator, shape, wide
from .philox import philox_uniform


def shortcut_mask(seed: Tensor, shape: tuple[int, ...], keep_probability: float) -> Tensor:
    """The draw of ``masked_shortcut``: bool [B, 1, H, W] for maps of ``shape`` [B, C, H, W]."""
    B, _, H, W = shape
    return (philox_uniform(seed, B * H * W) < keep_probability).view(B, 1, H, W)


def _zero_unless(mask: Tensor, x: Tensor) -> Tensor:
    """``torch.where(mask, x, 0)`` by its bits, which is faster where the mask is broadcast."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (-mask.to(bits) & x.view(bits)).view(x.dtype)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return wide(x) * scale[:, None, None] + shift[:, None, None]


def _masked_shortcut_cpu(
    inpainted: Tensor, shortcut: Tensor,
    keep_probability: float, seed: Tensor, scale: Tensor | None, shift: Tensor | None,
) -> Tensor:  # fmt: skip
    if scale is not None and shift is not None:
        inpainted = _affine(inpainted, scale, shift).relu().to(shortcut.dtype)
    return torch.where(shortcut_mask(seed, inpainted.shape, keep_probability), inpainted, shortcut)


def _masked_shortcut_backward_cpu(
    grad: Tensor, inpainted: Tensor | None,
    keep_probability: float, seed: Tensor, scale: Tensor | None, shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of inpainted, shortcut, scale and shift; the last two empty without an affine."""
    mask = shortcut_mask(seed, grad.shape, keep_probability)
    kept, passed = _zero_unless(mask, grad), _zero_unless(~mask, grad)
    if inpainted is None or scale is None or shift is None:
        return kept, passed, grad.new_empty(0), grad.new_empty(0)
    active = wide(kept) * (_affine(inpainted, scale, shift) > 0)
    # What is not active may hold NaN, which times zero would stay.
    grad_scale = torch.where(active != 0, active * inpainted, 0).sum(dim=(0, 2, 3))
    grad_inpainted = (active * scale[:, None, None]).to(grad.dtype)
    return grad_inpainted, passed, grad_scale, active.sum(dim=(0, 2, 3))


@operator(_masked_shortcut_cpu)
def _masked_shortcut(inpainted: Tensor, *rest: Any) -> Tensor:
    if dispatch.serves_masked_shortcut(inpainted):
        return kernels("masked_shortcut").forward(inpainted, *rest)
    return _masked_shortcut_cpu(inpainted, *rest)


@operator(_masked_shortcut_backward_cpu)
def _masked_shortcut_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if dispatch.serves_masked_shortcut(grad):
        return kernels("masked_shortcut").backward(grad, *rest)
    return _masked_shortcut_backward_cpu(grad, *rest)


@_masked_shortcut.register_fake
def _(inpainted, shortcut, keep_probability, seed, scale, shift):  # type: ignore[no-untyped-def]
    return torch.where(inpainted[:, :1].bool(), inpainted, shortcut)


@_masked_shortcut_backward.register_fake
def _(grad, inpainted, keep_probability, seed, scale, shift):  # type: ignore[no-untyped-def]
    mask = grad[:, :1].bool()
    kept, passed = torch.where(mask, grad, 0), torch.where(mask, 0, grad)
    if scale is None:
        return kept, passed, grad.new_empty(0), grad.new_empty(0)
    return kept, passed, torch.empty_like(scale), torch.empty_like(shift)


def _save_draw(ctx: Any, inputs: Any, output: Any) -> None:
    inpainted, _, ctx.keep_probability, seed, scale, shift = inputs
    # Without an affine the gradient needs nothing of the maps.
    ctx.save_for_backward(None if scale is None else inpainted, seed, scale, shift)


def _shortcut_gradients(ctx: Any, grad: Tensor) -> Any:
    inpainted, seed, scale, shift = ctx.saved_tensors
    kept, passed, grad_scale, grad_shift = _masked_shortcut_backward(
        grad, inpainted, ctx.keep_probability, seed, scale, shift
    )
    if scale is None:
        grad_scale = grad_shift = None
    return kept, passed, None, None, grad_scale, grad_shift


_masked_shortcut.register_autograd(_shortcut_gradients, setup_context=_save_draw)


def masked_shortcut(
    inpainted: Tensor, shortcut: Tensor, keep_probability: float, seed: Tensor | None = None,
    *, scale: Tensor | None = None, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``mask * inpainted + (1 - mask) * shortcut``, one Bernoulli draw per (image, row, column).

    Paper section 3.3. The draw is shared by the channels and is a function of ``seed`` alone: the
    same on every device, made again in the backward, never stored. With ``scale`` and ``shift``,
    ``relu(scale * inpainted + shift)`` takes the place of ``inpainted`` in the same pass: a batch
    norm of known statistics and the activation behind it.

    Args:
        inpainted, shortcut: [B, C, H, W], same dtype and device.
        keep_probability: chance of ``inpainted``, 0 to 1.
        seed: int64 [] on the same device; drawn from PyTorch's generator unless given.
        scale, shift: [C] each, or neither; computed with in float32.

    Raises:
        ValueError: shapes or dtypes differ, the probability is outside [0, 1], or only one of
            ``scale`` and ``shift`` is given.

    >>> ones, zeros = torch.ones(1, 3, 2, 4), torch.zeros(1, 3, 2, 4)
    >>> masked_shortcut(ones, zeros, 0.5, torch.tensor(7))[0, 0]
    tensor([[1., 0., 1., 0.],
            [0., 0., 1., 0.]])
    """
    if inpainted.dim() != 4 or inpainted.shape != shortcut.shape:
        raise ValueError(
            f"inpainted is {shape(inpainted)} and shortcut {shape(shortcut)}; both must be the "
            "same [B, C, H, W]."
        )
    if inpainted.dtype != shortcut.dtype:
        raise ValueError(
            f"inpainted is {inpainted.dtype} and shortcut {shortcut.dtype}; they must agree."
        )
    if not 0.0 <= keep_probability <= 1.0:
        raise ValueError(f"keep_probability is {keep_probability}; it must lie in [0, 1].")
    if seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=inpainted.device)
    if scale is not None or shift is not None:
        scale, shift = _affine_parameters(inpainted, scale, shift)
    return _masked_shortcut(inpainted, shortcut, float(keep_probability), seed, scale, shift)


def _affine_parameters(
    inpainted: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    C = inpainted.shape[1]
    if scale is None or shift is None:
        given, absent = ("shift", "scale") if scale is None else ("scale", "shift")
        raise ValueError(f"{given} is given without {absent}; an affine needs both, [{C}] each.")
    if scale.shape != (C,) or shift.shape != (C,):
        raise ValueError(f"scale is {shape(scale)} and shift {shape(shift)}; both must be [{C}].")
    dtype = torch.promote_types(inpainted.dtype, torch.float32)
    return scale.to(dtype), shift.to(dtype)
