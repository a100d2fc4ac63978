"""The in-painting block (paper section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .memory import MemoryMatrix, MemoryQueue, SharedMemoryQueue
from .norm import NormSequential

HEADS = 8  # published

MEMORIES = {"queue": MemoryQueue, "shared": SharedMemoryQueue, "matrix": MemoryMatrix}
VARIANTS: dict[str, tuple[str, ...]] = {
    "memory": tuple(MEMORIES),
    "mixing": ("attention", "convolution"),
    "shortcut": ("masked", "soft"),
}
"""Arguments that the published block does not have, and their values, the published ones first."""


class InpaintBlock(nn.Module):
    """In-paint the features of every patch from the memories of its neighbours.

    Args:
        num_slots: M, slots of each memory queue.
        num_memory: N, number of patches of an image, a square number.
        memory_channel: C = width / 4 * h * w for features of h x w per patch.
        shrink_thres: int k > 0 Gumbel shrinkage, float > 0 hard shrinkage, 0 none.
        ratio: chance that a position is in-painted in training, kept as ``mask_ratio``.
        drop: dropout of the feed-forward layers.
        memory: "queue"; "shared", one queue for all patches; "matrix", learnable slots.
        mixing: how neighbours are combined: "attention", or "convolution", 3 x 3 over the patches.
        shortcut: in training "masked", or "soft", which blends ``ratio`` of the in-painted features
            with the input everywhere.

    >>> block = InpaintBlock(16, num_slots=20, num_memory=4, memory_channel=16).eval()
    >>> features = torch.rand(8, 16, 2, 2)  # two images of four patches
    >>> block(features).shape
    torch.Size([8, 16, 2, 2])
    """

    code: Tensor
    projected: Tensor | None  # [N, M, 3C], while frozen
    codes_folded = False  # whether bottleneck_conv2 has the codes of places in its biases

    def __init__(
        self,
        num_in_ch: int,
        num_slots: int,
        num_memory: int = 9,
        memory_channel: int = 2048,
        shrink_thres: int | float = 5,
        ratio: float = 0.95,
        drop: float = 0.0,
        *,
        memory: str = "queue",
        mixing: str = "attention",
        shortcut: str = "masked",
    ) -> None:
        super().__init__()
        check_variant({"memory": memory, "mixing": mixing, "shortcut": shortcut})
        if memory_channel % HEADS:
            raise ValueError(
                f"memory_channel is {memory_channel}; the attention's {HEADS} heads must divide it."
            )
        self.num_memory = num_memory
        self.mask_ratio = ratio
        narrow = num_in_ch // 4
        self.bottleneck_conv1 = NormSequential(
            nn.Conv2d(num_in_ch, narrow, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU()
        )
        self.memory = MEMORIES[memory](num_slots, memory_channel, shrink_thres, num_memory)
        self.shortcut = shortcut
        self.query: nn.Module | None = None  # in place of in_proj's share in it, if there is one
        if mixing == "attention":
            # Holds the projections under their published names; the attention itself is our own.
            self.attention: nn.MultiheadAttention | None
            self.attention = nn.MultiheadAttention(memory_channel, HEADS)
        else:
            self.attention = None
            self.convolution = nn.Conv2d(memory_channel, memory_channel, 3, padding=1)
        self.attn_norm1 = nn.LayerNorm(memory_channel)
        self.ff = nn.Sequential(
            nn.Linear(memory_channel, memory_channel // 4),
            nn.Dropout(drop),
            nn.ReLU(),
            nn.Linear(memory_channel // 4, memory_channel),
            nn.Dropout(drop),
        )
        self.attn_norm2 = nn.LayerNorm(memory_channel)
        self.register_buffer("code", place_codes(num_memory), persistent=False)
        self.register_buffer("projected", None, persistent=False)
        self.register_load_state_dict_post_hook(self._after_loading)
        self.bottleneck_conv2 = NormSequential(
            nn.Conv2d(narrow + self.code.shape[1], num_in_ch, 1),
            nn.BatchNorm2d(num_in_ch),
            nn.ReLU(),
        )

    @torch.no_grad()
    def freeze(self) -> None:
        """Project every slot to its key and value once, for evaluation with fixed weights.

        An answer is a weighted sum of slots, and its key the same sum of projected slots, so that
        the answers, near half of the block's work, need not be projected at every call. A copy of
        the block is frozen too, and so is the block when it moves to another device or dtype.
        ``train()`` ends this, and it has no effect once slots or weights have changed.
        Convolutional mixing has nothing to freeze.
        """
        if self.attention is None:
            return
        slots = self.memory.slots
        w_kv = self.attention.in_proj_weight[slots.shape[2] :]
        self.projected = torch.cat([slots, F.linear(slots, w_kv)], dim=-1)
        self._projected_from = self._state_of_weights()

    def _state_of_weights(self) -> list[tuple[int, int]]:
        assert self.attention is not None
        sources = (self.memory.slots, self.attention.in_proj_weight)
        return [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in sources]

    def _is_frozen(self) -> bool:
        if self.projected is None or torch.is_grad_enabled():
            return False
        # A compiled program cannot check; it is made for fixed weights.
        return torch.compiler.is_compiling() or self._projected_from == self._state_of_weights()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InpaintBlock:
        """What ``to()``, ``half()``, ``to_empty()`` and the like do to the tensors."""
        before = self.code
        super()._apply(fn, recurse)
        if self.code is not before:  # ``to_empty()`` has lost them
            self._write_code(self.code.device)
        self._freeze_anew()
        return self

    @torch.no_grad()
    def _write_code(self, device: torch.device) -> None:
        """Write the codes of the places anew, which no state dict has."""
        if self.code.device != device:
            self.code = torch.empty_like(self.code, device=device)
        self.code.copy_(place_codes(self.num_memory, device))

    @staticmethod
    def _after_loading(block: InpaintBlock, keys: object) -> None:
        block._write_code(block.attn_norm1.weight.device)  # the weights may have been assigned

    def __getstate__(self) -> dict[str, Any]:
        """Of a deep copy or a pickle: the projections too, if they are those of the weights."""
        if self.projected is not None and self._projected_from != self._state_of_weights():
            self.freeze()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.projected is not None:
            self._projected_from = self._state_of_weights()

    def _freeze_anew(self) -> None:
        if self.projected is not None:  # from what slots and weights are now, which is always right
            self.freeze()

    def train(self, mode: bool = True) -> InpaintBlock:
        if mode:
            self.projected = None
        return super().train(mode)

    def inpaint(self, f: Tensor) -> Tensor:
        """In-painted features [B, N, C] of the patch features f [B, N, C]."""
        m, mixed = self._convolve(f) if self.attention is None else self._attend(f, self.attention)
        y = (self.attn_norm1(mixed) + m).relu()
        return (self.attn_norm2(self.ff(y)) + y).relu()

    def _attend(self, f: Tensor, attention: nn.MultiheadAttention) -> tuple[Tensor, Tensor]:
        """Answers of the memories and attention to those of the neighbours, [B, N, C] each."""
        C = f.shape[2]
        w_q, w_kv = attention.in_proj_weight.split((C, 2 * C))
        b_q, b_kv = attention.in_proj_bias.split((C, 2 * C))
        # Each patch's key and value once; its neighbours read them in place.
        if self._is_frozen():
            m, projected = self.memory.look_up(f, self.projected).split((C, 2 * C), dim=-1)
            projected = projected + b_kv
        else:
            m = self.memory(f)
            projected = F.linear(m, w_kv, b_kv)
        key, value = projected.chunk(2, dim=-1)
        pad_key, pad_value = b_kv.chunk(2)
        query = F.linear(f, w_q, b_q) if self.query is None else self.query(f)
        attended = ops.neighbourhood_attention(query, key, value, pad_key, pad_value, HEADS)
        return m, attention.out_proj(attended)

    def _convolve(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Answers of the memories and a convolution over them, [B, N, C] each."""
        m = self.memory(f)
        side = math.isqrt(self.num_memory)
        grid = m.transpose(1, 2).unflatten(2, (side, side))  # [B, C, P, P]
        return m, self.convolution(grid).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """In-paint features [B*N, width, h, w], patch index fastest; the shape stays."""
        narrow = self.bottleneck_conv1(x)
        BN, c, h, w = narrow.shape
        B = BN // self.num_memory
        z = self.inpaint(narrow.reshape(B, self.num_memory, c * h * w)).view(BN, c, h, w)
        if not self.codes_folded:
            code = self.code.to(z.dtype).repeat(B, 1)[:, :, None, None].expand(-1, -1, h, w)
            z = torch.cat([z, code], dim=1)
        inpainted = self.bottleneck_conv2(z)
        if not self.training:
            return inpainted
        if self.shortcut == "soft":
            return torch.lerp(x.to(inpainted.dtype), inpainted, self.mask_ratio)
        return ops.masked_shortcut(inpainted, x.to(inpainted.dtype), self.mask_ratio)


def place_codes(num_memory: int, device: torch.device | None = None) -> Tensor:
    """The places of N patches in binary digits [N, bits], float32."""
    bits = torch.arange(num_memory.bit_length() - 1, -1, -1, device=device)
    return ((torch.arange(num_memory, device=device)[:, None] >> bits) & 1).float()


def check_variant(variant: Mapping[str, str]) -> None:
    """Raise ValueError unless these are arguments and values in ``VARIANTS``."""
    for name, value in variant.items():
        if name not in VARIANTS:
            raise ValueError(f"inpainting has {name!r}; known are {', '.join(VARIANTS)}.")
        if value not in VARIANTS[name]:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(VARIANTS[name])}.")
