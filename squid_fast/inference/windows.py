"""The decoder's memories for maps in half precision on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels import dispatch
from ..modules.memory import MemoryMatrixBlockV3, MemoryMatrixBlockV4, _MemoryBlock


class WindowMemory(nn.Module):
    """A decoder memory in evaluation mode, whose maps stay in half precision and channels-last.

    Slots are laid out as windows lie in such maps, and split once into parts of half precision
    that add up to them, so that the scores are those of float32.

    Args:
        block: whose slots are copied; its shrinkage has to be Gumbel's, see ``fits``.
        channels: of the maps.
    """

    slots: Tensor  # [parts, N, M, C]

    def __init__(
        self, block: nn.Module, channels: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        assert isinstance(block, _MemoryBlock)
        assert self.fits(block)
        self.block = block
        self.top_k = int(block.memory.shrink_thres)
        slots, side = block.memory.slots.detach(), math.isqrt(block.num_memory)
        self.grid, self.stacked = (side, side), 1
        if isinstance(block, MemoryMatrixBlockV4):  # the map is one window, made of windows
            h = math.isqrt(slots.shape[2] // (block.num_memory * channels))
            slots = slots.unflatten(2, (side, side, h, h, channels)).transpose(3, 4).flatten(2)
            self.grid = (1, 1)
        elif isinstance(block, MemoryMatrixBlockV3):  # a map is a window, (channel, row, column)
            slots = slots.unflatten(2, (channels, -1)).transpose(2, 3).flatten(2)
            self.grid, self.stacked = (block.num_memory, 1), block.num_memory
        self.register_buffer("slots", ops.split(slots, 3, dtype), persistent=False)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether that is a memory with Gumbel shrinkage, which the windows' lookup has."""
        if not isinstance(block, _MemoryBlock):
            return False
        return isinstance(block.memory.shrink_thres, int) and block.memory.shrink_thres > 0

    def serves(self, x: Tensor) -> bool:
        """Whether kernels look these maps up; if not, the block itself does, in float32."""
        return dispatch.serves_window_lookup(x, self.slots, self.top_k)

    def forward(self, x: Tensor) -> Tensor:
        """Answers to maps of that shape [B', c, h, w]: in their dtype where kernels serve."""
        if not self.serves(x):
            return self.block(x.float())
        B, c, h, w = x.shape
        # The maps of an image's patches, in rows one below the other, are one map of windows.
        stacked = x.permute(0, 2, 3, 1).reshape(B // self.stacked, self.stacked * h, w, c)
        answer = ops.window_lookup(stacked.permute(0, 3, 1, 2), self.slots, self.top_k, self.grid)
        return answer.permute(0, 2, 3, 1).reshape(B, h, w, c).permute(0, 3, 1, 2)
