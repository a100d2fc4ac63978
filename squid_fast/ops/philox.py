"""Random numbers that are a function of a seed and a counter, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox_uniform(seed: Tensor, count: int) -> Tensor:
    """Uniform float32 [count] in [0, 1): Philox 4x32-10 of the counters 0 .. count-1.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". 32-bit words are held in
    int64, whose multiplication wraps, so that it runs on every device. The numbers are those of
    Triton's ``tl.rand(seed, offset)``.
    """

    def column(*words: int) -> Tensor:
        # Written on the device: a copy from the host would not be captured in a CUDA graph.
        return torch.stack([torch.full((1,), word, device=seed.device) for word in words])

    rounds = torch.arange(10, device=seed.device)[:, None, None]
    keys = (torch.stack([seed, seed >> 32]).view(2, 1) + rounds * column(*_WEYL)) & _LOW
    multipliers = column(*_MULTIPLIERS)
    # Words 0 and 2 of the four, then 1 and 3; the counter is word 0.
    even = torch.arange(count, device=seed.device) * column(1, 0)
    odd = torch.zeros_like(even)
    for key in keys:
        product = (even * multipliers).flip(0)
        even, odd = ((product >> 32) & _LOW) ^ odd ^ key, product & _LOW
    word = even[0]
    # As a signed word folded at zero: 31 random bits, scaled so that 1 is never reached.
    return torch.where(word >= 2**31, _LOW - word, word).float() * 4.6566127342e-10
