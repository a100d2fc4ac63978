"""float32 means float32, on a GPU too.

NVIDIA's cards can compute convolutions and products of matrices in TF32, which keeps 10 bits of
each factor, and PyTorch lets float32 convolutions do so by default. That moves scores by a tenth of
their standard deviation (measured on an H200). Therefore ``tf32(False)`` holds wherever squid_fast
computes: in scoring, of a bf16 network's float32 parts too, in training, and in the published way
that both are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32(convolutions: bool, products: bool = False) -> Iterator[None]:
    """Whether a GPU computes float32 convolutions and products of matrices in TF32 inside.

    The setting is PyTorch's own, for the whole process, and is as before behind the block. A CUDA
    graph keeps the one under which it was captured.

    >>> with tf32(False):
    ...     product = torch.eye(2) @ torch.eye(2)
    """
    # PyTorch 2.9 brought settings by operation, and raises where they contradict the former ones.
    of_convolutions = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
    by_operation = of_convolutions is not torch.backends.cudnn
    name = "fp32_precision" if by_operation else "allow_tf32"
    off, on = ("ieee", "tf32") if by_operation else (False, True)
    places = of_convolutions, torch.backends.cuda.matmul
    before = [getattr(place, name) for place in places]
    try:
        for place, value, wanted in zip(places, before, (convolutions, products), strict=True):
            if (value == on) != wanted:
                setattr(place, name, on if wanted else off)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            if getattr(place, name) != value:
                setattr(place, name, value)
