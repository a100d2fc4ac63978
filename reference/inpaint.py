"""The in-painting block (paper section 3.3, "Formulating Anomaly Detection as In-painting").

Each patch's bottleneck feature f is looked up in its own memory queue; a transformer layer then
in-paints the patch from the answers of its neighbours' memories, with f as the query.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .memory import MemoryQueue
from .shortcut import masked_shortcut

HEADS = 8


def patch_code(num_patches: int) -> torch.Tensor:
    """Binary code [N, floor(log2 N) + 1] of the patch index, most significant bit first."""
    bits = num_patches.bit_length()
    index = torch.arange(num_patches)
    return torch.stack([(index >> (bits - 1 - b)) & 1 for b in range(bits)], dim=1).float()


class InpaintBlock(nn.Module):
    """In-paint patch features [B*N, width, h, w]; see the module text.

    Args:
        num_in_ch: width of the features.
        num_slots: slots of each memory queue.
        num_memory: N, patches of an image.
        memory_channel: C = width / 4 * h * w.
        shrink_thres: see ``memory.shrinkage_of``.
        ratio: probability that a position is in-painted in training.
        drop: dropout of the feed-forward layers.

    >>> block = InpaintBlock(16, num_slots=20, num_memory=4, memory_channel=16).eval()
    >>> block(torch.rand(8, 16, 2, 2)).shape  # two images of four patches
    torch.Size([8, 16, 2, 2])
    """

    code: torch.Tensor

    def __init__(
        self,
        num_in_ch: int,
        num_slots: int,
        num_memory: int = 9,
        memory_channel: int = 2048,
        shrink_thres: int | float = 5,
        ratio: float = 0.95,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.mask_ratio = ratio
        narrow = num_in_ch // 4
        self.bottleneck_conv1 = nn.Sequential(
            nn.Conv2d(num_in_ch, narrow, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU()
        )
        self.memory = nn.ModuleList(
            MemoryQueue(num_slots, memory_channel, shrink_thres) for _ in range(num_memory)
        )
        self.attention = nn.MultiheadAttention(memory_channel, HEADS)
        self.attn_norm1 = nn.LayerNorm(memory_channel)
        self.ff = nn.Sequential(
            nn.Linear(memory_channel, memory_channel // 4),
            nn.Dropout(drop),
            nn.ReLU(),
            nn.Linear(memory_channel // 4, memory_channel),
            nn.Dropout(drop),
        )
        self.attn_norm2 = nn.LayerNorm(memory_channel)
        code = patch_code(num_memory)
        self.register_buffer("code", code, persistent=False)
        self.bottleneck_conv2 = nn.Sequential(
            nn.Conv2d(narrow + code.shape[1], num_in_ch, 1), nn.BatchNorm2d(num_in_ch), nn.ReLU()
        )

    def attend(self, query: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Attention [B, N, C] of the queries to the neighbours' looked-up features.

        The eight neighbours are keys and values of PyTorch's own attention, zeros where the grid
        ends, each projected anew for every patch that sees it: that is what the published code
        computes. ``neighbourhood_attention`` is the same with every patch projected once.
        """
        B, N, _ = query.shape
        grid = rearrange(memory, "b (r c) d -> b d r c", r=math.isqrt(N))
        windows = rearrange(F.unfold(grid, 3, padding=1), "b (d k) n -> k (b n) d", k=9)
        neighbours = torch.cat([windows[:4], windows[5:]])  # all but the patch itself
        query = rearrange(query, "b n d -> 1 (b n) d")
        attended, _ = self.attention(query, neighbours, neighbours, need_weights=False)
        return rearrange(attended, "1 (b n) d -> b n d", b=B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        N = len(self.memory)
        narrow = self.bottleneck_conv1(x)
        f = rearrange(narrow, "(b n) c h w -> b n (c h w)", n=N)
        m = torch.stack([queue(f[:, n]) for n, queue in enumerate(self.memory)], dim=1)
        y = torch.relu(self.attn_norm1(self.attend(f, m)) + m)
        z = torch.relu(self.attn_norm2(self.ff(y)) + y)
        z = z.reshape(narrow.shape)
        code = self.code.to(z).repeat(x.shape[0] // N, 1)[:, :, None, None]
        code = code.expand(-1, -1, *z.shape[-2:])
        inpainted = self.bottleneck_conv2(torch.cat([z, code], dim=1))
        return masked_shortcut(inpainted, x, self.mask_ratio) if self.training else inpainted
