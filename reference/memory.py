"""The memories (paper section 3.2, "Inventing memory queue as dictionary").

*Memory queue*: slots are features of recent training images, held in a ring and never learned,
so that its answers are features that really occurred. *Memory matrix*: slots are parameters, as in
MemAE. Both are *space-aware*: every place in the image has a memory of its own.

The three block types put memory matrices into the decoder; their names are the published ones
and appear in configurations.
"""

import math
from typing import Any

import torch
from einops import rearrange
from torch import nn

from .lookup import memory_lookup
from .shortcut import masked_shortcut


def shrinkage_of(shrink_thres: int | float) -> dict[str, Any]:
    """The published switch: an int k > 0 is Gumbel, a float > 0 is hard shrinkage, 0 is neither."""
    if shrink_thres <= 0:
        return {}
    return {"top_k": shrink_thres} if isinstance(shrink_thres, int) else {"threshold": shrink_thres}


class MemoryQueue(nn.Module):
    """A ring of the last M features, [M, C]; ``update`` enqueues the last batch looked up.

    >>> queue = MemoryQueue(num_slots=4, slot_dim=2, shrink_thres=0).train()
    >>> answers = queue(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> queue.update()
    >>> queue.memMatrix[:2].tolist(), queue.ptr
    ([[1.0, 2.0], [3.0, 4.0]], 2)
    """

    memMatrix: torch.Tensor

    def __init__(self, num_slots: int, slot_dim: int, shrink_thres: int | float = 5) -> None:
        super().__init__()
        self.shrinkage = shrinkage_of(shrink_thres)
        bound = 1 / math.sqrt(slot_dim)
        self.register_buffer("memMatrix", torch.empty(num_slots, slot_dim).uniform_(-bound, bound))
        self.ptr = 0
        self.pending: torch.Tensor | None = None

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """query [B, C] -> answer [B, C]."""
        if self.training:
            self.pending = query.detach()
        return memory_lookup(query, self.memMatrix, **self.shrinkage)

    @torch.no_grad()
    def update(self) -> None:
        """Write the pending batch over the oldest slots; a second call does nothing."""
        if self.pending is None:
            return
        M = self.memMatrix.shape[0]
        for feature in self.pending:
            self.memMatrix[self.ptr] = feature
            self.ptr = (self.ptr + 1) % M
        self.pending = None


class MemoryMatrix(nn.Module):
    """M learnable slots, [M, C].

    >>> MemoryMatrix(num_slots=10, slot_dim=4, shrink_thres=3)(torch.rand(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, num_slots: int, slot_dim: int, shrink_thres: int | float = 5) -> None:
        super().__init__()
        self.shrinkage = shrinkage_of(shrink_thres)
        bound = 1 / math.sqrt(slot_dim)
        self.memMatrix = nn.Parameter(torch.empty(num_slots, slot_dim).uniform_(-bound, bound))

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """query [B, C] -> answer [B, C]."""
        return memory_lookup(query, self.memMatrix, **self.shrinkage)


class _MemoryBlock(nn.Module):
    """Look up a decoder map and, in training, mix the answer with the map by a masked shortcut.

    The mixing ratio is 0.95 unless given: the model's own ``ratio`` does not reach these blocks.
    """

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        num_memory: int,
        shrink_thres: int | float = 5,
        ratio: float = 0.95,
    ) -> None:
        super().__init__()
        self.num_memory = num_memory
        self.mask_ratio = ratio
        self.memory = self.make_memory(num_slots, slot_dim, shrink_thres)

    def make_memory(self, num_slots: int, slot_dim: int, shrink_thres: int | float) -> nn.Module:
        return nn.ModuleList(
            MemoryMatrix(num_slots, slot_dim, shrink_thres) for _ in range(self.num_memory)
        )

    def matrices(self) -> list[nn.Module]:
        return list(self.memory.children())

    def look_up(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer = self.look_up(x)
        return masked_shortcut(answer, x, self.mask_ratio) if self.training else answer


class MemoryMatrixBlock(_MemoryBlock):
    """Window i of every map it is given, a patch or the whole image, looks up matrix i."""

    def look_up(self, x: torch.Tensor) -> torch.Tensor:
        side, (H, W) = math.isqrt(self.num_memory), x.shape[-2:]
        cut = "b c (i h) (j w) -> b (i j) (h w c)"
        q = rearrange(x, cut, i=side, j=side)
        answers = torch.stack([m(q[:, i]) for i, m in enumerate(self.matrices())], dim=1)
        back = "b (i j) (h w c) -> b c (i h) (j w)"
        return rearrange(answers, back, i=side, j=side, h=H // side, w=W // side)


class MemoryMatrixBlockV3(_MemoryBlock):
    """Patch n of the image looks up matrix n."""

    def look_up(self, x: torch.Tensor) -> torch.Tensor:
        q = rearrange(x, "(b n) c h w -> b n (c h w)", n=self.num_memory)
        answers = torch.stack([m(q[:, i]) for i, m in enumerate(self.matrices())], dim=1)
        return answers.reshape(x.shape)


class MemoryMatrixBlockV4(_MemoryBlock):
    """Not space-aware: one matrix for the whole map, its windows laid end to end."""

    def make_memory(self, num_slots: int, slot_dim: int, shrink_thres: int | float) -> nn.Module:
        return MemoryMatrix(num_slots, slot_dim, shrink_thres)

    def look_up(self, x: torch.Tensor) -> torch.Tensor:
        side, (H, W) = math.isqrt(self.num_memory), x.shape[-2:]
        answer = self.memory(rearrange(x, "b c (i h) (j w) -> b (i j h w c)", i=side, j=side))
        back = "b (i j h w c) -> b c (i h) (j w)"
        return rearrange(answer, back, i=side, j=side, h=H // side, w=W // side)


BLOCKS = {c.__name__: c for c in (MemoryMatrixBlock, MemoryMatrixBlockV3, MemoryMatrixBlockV4)}
