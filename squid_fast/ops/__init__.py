"""The five operations of SQUID as PyTorch custom operators, one file per operation.

Each public function checks its arguments and calls an operator ``torch.ops.squid_fast.<name>``
that has a fake implementation (so that ``torch.compile`` and export see through it) and a gradient
whose backward is an operator too. An operator runs the Triton kernel of its name where
``kernels.choice`` says that it serves, else the vectorised PyTorch of the same name. Nothing
synchronises with the host. Results are contiguous, but for those of the masked shortcut, which keep
their layout. NaN stays within its row. Double backward is not supported.

Symbols: B images, N patches of an image, M memory slots, C slot width, k = ``top_k``.
"""

from .attention import neighbourhood_attention
from .lookup import memory_lookup
from .shortcut import masked_shortcut
from .shrinkage import gumbel_shrinkage, hard_shrinkage

__all__ = [
    "gumbel_shrinkage",
    "hard_shrinkage",
    "masked_shortcut",
    "memory_lookup",
    "neighbourhood_attention",
]
