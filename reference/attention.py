"""Attention of every patch to its neighbours (paper section 3.3).

The N looked-up features of an image lie on a P x P grid. A patch attends to its eight neighbours
and never to itself, since it is the patch to be in-painted.
"""

import math

import torch

NEIGHBOURS = [(dr, dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1) if (dr, dc) != (0, 0)]


def neighbourhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pad_key: torch.Tensor,
    pad_value: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Multi-head attention [B, N, C] of each patch over its eight neighbours.

    query, key, value: [B, N, C], already projected, patches row-major on a square grid.
    pad_key, pad_value: [C], key and value of a place outside the grid. The published block puts
    zeros there and attends to them like to any other place, so after the projection they are the
    projection's biases. Nothing is masked: at P = 1 a patch sees eight times the same padding.

    >>> query, key, value = torch.rand(3, 1, 9, 4)
    >>> pad = torch.zeros(4)
    >>> neighbourhood_attention(query, key, value, pad, pad, num_heads=2).shape
    torch.Size([1, 9, 4])
    """
    B, N, C = query.shape
    P = math.isqrt(N)
    head = C // num_heads
    outputs = []
    for n in range(N):
        row, column = divmod(n, P)
        keys, values = [], []
        for dr, dc in NEIGHBOURS:
            r, c = row + dr, column + dc
            inside = 0 <= r < P and 0 <= c < P
            keys.append(key[:, r * P + c] if inside else pad_key.expand(B, C))
            values.append(value[:, r * P + c] if inside else pad_value.expand(B, C))
        q = query[:, n].view(B, num_heads, 1, head)
        k = torch.stack(keys, dim=1).view(B, 8, num_heads, head).transpose(1, 2)
        v = torch.stack(values, dim=1).view(B, 8, num_heads, head).transpose(1, 2)
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(head), dim=-1)
        outputs.append((weights @ v).reshape(B, C))
    return torch.stack(outputs, dim=1)
