"""Which calls the Triton kernels serve: the one place where that is decided, with the reasons.

Every other call runs on the PyTorch implementations in ``squid_fast.ops``, with the same results.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

SETTINGS = ("on", "off", "interpret")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The k best of a row are held in registers and searched by comparison; past this, sorting is the
# better method, and PyTorch sorts.
LARGEST_TOP_K = 64
# Up to here all scores of a lookup are computed before any is selected; beyond, the best are sought
# while they are computed, so that forward passes need no room for them.
LARGEST_SCORED = 512
# Maps of the discriminator beyond these make a program walk through many blocks, and through all
# of them twice; nobody is known to train on larger images.
LARGEST_IMAGE = 256
LARGEST_WIDTH = 128  # its published channels: the last layer's program has the sums of all


def _checked(setting: str, source: str) -> str:
    if setting not in SETTINGS:
        raise ValueError(f"{source} is {setting!r}; it must be one of {', '.join(SETTINGS)}.")
    return setting


_setting = _checked(os.environ.get("SQUID_FAST_KERNELS", "on"), "SQUID_FAST_KERNELS")


@contextmanager
def use(setting: str) -> Iterator[None]:
    """Choose between kernels and PyTorch for the calls inside, whatever the environment says.

    Holds for the whole process, since PyTorch runs backward passes in threads of its own.

    Args:
        setting: ``"on"``: kernels on GPUs (the default). ``"off"``: PyTorch everywhere, to find out
            whether a kernel is at fault. ``"interpret"``: kernels for tensors of the CPU too, in
            Triton's interpreter, which needs ``TRITON_INTERPRET=1`` in the environment; slow.

    Raises:
        ValueError: another setting.
        RuntimeError: with ``"interpret"``, by a call inside while ``TRITON_INTERPRET`` is not 1.

    >>> with use("off"):
    ...     serves_hard_shrinkage(torch.zeros(2, 3))
    False
    """
    global _setting
    before = _setting
    _setting = _checked(setting, "setting")
    try:
        yield
    finally:
        _setting = before


def setting() -> str:
    """The present setting, as of ``use``."""
    return _setting


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _is_able(device: torch.device) -> bool:
    # Older cards lack bfloat16 matrix instructions, for which the tiles are laid out.
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _serves(x: Tensor) -> bool:
    # An empty tensor needs no launch.
    return bool(x.numel()) and _runs(x.dtype, x.device)


def _runs(dtype: torch.dtype, device: torch.device) -> bool:
    # float64 is for checking gradients, where PyTorch is itself the reference.
    if _setting == "off" or dtype not in DTYPES or not _has_triton():
        return False
    if device.type != "cpu":
        return device.type == "cuda" and _is_able(device)
    if _setting == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "kernels are to serve a tensor of the CPU, but TRITON_INTERPRET is "
            f"{os.environ.get('TRITON_INTERPRET')!r}; it must be '1' before Triton is imported."
        )
    return _setting == "interpret"


# As ``torch.compiler.assume_constant_result`` does, which would import the compiler, for seconds.
_runs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serves_gumbel_shrinkage(logits: Tensor, top_k: int = 1) -> bool:
    """Whether a kernel shrinks these logits [..., M]; the backward has no ``top_k``."""
    return _serves(logits) and top_k <= LARGEST_TOP_K


def serves_hard_shrinkage(logits: Tensor) -> bool:
    """Whether a kernel shrinks these logits [..., M]."""
    return _serves(logits)


def serves_memory_lookup(query: Tensor, num_slots: int, mode: str, top_k: int) -> bool:
    """Whether kernels look up this query [B, N, C].

    Beyond ``LARGEST_SCORED`` slots, hard shrinkage and raw scores are two large matrix products
    with at most an elementwise step between them, at which cuBLAS is best.
    """
    if not _serves(query):
        return False
    return top_k <= LARGEST_TOP_K if mode == "gumbel" else num_slots <= LARGEST_SCORED


def serves_window_lookup(maps: Tensor, slots: Tensor, top_k: int) -> bool:
    """Whether kernels look up windows of these maps [B, c, H, W] in slots [parts, N, M, C].

    Slots in half precision, which is what they are split for; maps too, or in float32. All scores
    are written before any is selected, so that many slots are better sought by ``memory_lookup``.
    Addresses within 128 maps, and within the slots, are counted in 31 bits.
    """
    half = slots.dtype != torch.float32 and maps.dtype in (slots.dtype, torch.float32)
    few = slots.shape[2] <= LARGEST_SCORED and top_k <= LARGEST_TOP_K
    small = maps.shape[1:].numel() < 2**24 and slots.numel() < 2**31
    return _serves(maps) and half and few and small


def serves_masked_shortcut(inpainted: Tensor) -> bool:
    """Whether a kernel blends these maps [B, C, H, W].

    It counts positions in 31 bits, with room for the last tile, which may pass the end.
    """
    return _serves(inpainted) and inpainted.numel() // inpainted.shape[1] < 2**30


def serves_neighbourhood_attention(query: Tensor) -> bool:
    """Whether a kernel attends from this query [B, N, C]."""
    return _serves(query)


def serves_batch_norm(x: Tensor, parameter: Tensor | None) -> bool:
    """Whether kernels normalise these maps [B, C, H, W]; statistics and parameters are float32.

    Positions are counted in 31 bits, with room for the last part and tile, which may pass the end.
    """
    if parameter is not None and parameter.dtype != torch.float32:
        return False
    return _serves(x) and x.numel() // x.shape[1] < 2**30


def serves_upsample_concat(maps: Tensor) -> bool:
    """Whether a kernel resizes these maps, or their gradients, of which it counts 31 bits of tiles.

    Contiguous ones too: there its stores are narrower, but PyTorch would need a second pass for the
    concatenation, a third one for patches, and atomics in the backward.
    """
    return _serves(maps) and maps.numel() // maps.shape[1] < 2**31


def serves_discriminator_score(images: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether kernels score these images [B, 1, H, W] with convolutions [Cout, Cin, 5, 5]."""
    return (
        _serves(images)
        and max(images.shape[2:]) <= LARGEST_IMAGE
        and all(x.dtype == torch.float32 and x.shape[0] <= LARGEST_WIDTH for x in weights)
    )


def serves_stem(images: Tensor, weight: Tensor, num_patch: int, dtype: torch.dtype) -> bool:
    """Whether a kernel convolves these images [B, Cin, H, W].

    It is made for grey images, and counts the numbers of a patch's maps in 31 bits.
    """
    B, Cin, H, W = images.shape
    if Cin != 1 or not B or H * W // num_patch**2 * weight.shape[0] >= 2**31:
        return False
    pixels = images.dtype == torch.uint8 or images.dtype in DTYPES
    return pixels and dtype in DTYPES and _serves(weight)


def serves_reconstruct(x: Tensor, images: Tensor) -> bool:
    """Whether a kernel makes reconstructions and errors of these maps and images [B, Cin, H, W].

    It is made for grey images, whose pixels it counts in 31 bits.
    """
    if images.shape[1] != 1 or images.shape[2] * images.shape[3] >= 2**31:
        return False
    return (images.dtype == torch.uint8 or images.dtype in DTYPES) and _serves(x)


def serves_split_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether a kernel multiplies these rows [R, T] by weights in two parts [2, S, T].

    Rows in half precision have no low part, and a library's product of them is as exact. Weights in
    float32 have none either, and matrix units would take them for TF32.
    """
    split = x.dtype == torch.float32 != weight.dtype
    return split and _serves(x) and _serves(weight)


def serves_cell_convolution(x: Tensor, weights: Tensor) -> bool:
    """Whether a kernel convolves maps [B, C, H, W] with weights [.., U, V, C, P, Q, D].

    In half precision only, for which the tiles are made, and with channels that fill them.
    """
    C, columns, D = x.shape[1], weights.shape[5:].numel(), weights.shape[7]
    fits = all(n in (16, 32, 64, 128, 256) for n in (C, D, columns)) and D <= 128
    # Offsets within the images of a tile, 128 at most, are counted in 31 bits.
    counted = 128 * max(C, columns) * x.shape[2] * x.shape[3] < 2**31
    return _serves(x) and x.dtype != torch.float32 and fits and counted


def serves_phases(x: Tensor, weights: Tensor) -> bool:
    """Whether the resize of these maps and the convolution behind it are one product.

    Predicted for 256 images of ``zhanglab`` on an H100, not yet measured: 0.27 and 0.29 ms for the
    last two stages' first convolutions, bound by shared memory; resize and convolution apart are
    0.74 on average (found on an H200). Small maps are mostly border, and cheap to resize.
    """
    return serves_cell_convolution(x, weights) and min(x.shape[2:]) >= 16


def serves_narrow_convolution(x: Tensor, weights: Tensor) -> bool:
    """Whether these maps' 3 x 3 convolution of few output channels is made in cells of 1 x 2.

    Predicted for 32 channels at full resolution and 256 images on an H100, not yet measured: 0.25
    ms, bound by shared memory; cuDNN's is about 0.32 (found on an H200). From 64 channels on, its
    tiles are full, and it is the better one.
    """
    return serves_cell_convolution(x, weights) and weights.shape[7] <= 32
