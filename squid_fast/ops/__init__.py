"""The operations of SQUID as PyTorch custom operators, one file per operation.

Each public function checks its arguments and calls an operator ``torch.ops.squid_fast.<name>``.
Beside the operator stand its PyTorch implementation ``_<name>_cpu``, a fake implementation (so that
``torch.compile`` and export see through it) and a gradient, which is an operator too. An operator
runs the Triton kernel of its name where ``kernels.dispatch`` says that it serves, else the PyTorch
implementation: on every CPU, in float64, and for the shapes that it gives its reasons for. Nothing
synchronises with the host. Results are contiguous, but for those of the masked shortcut, which keep
their layout, and of the window lookup, which are channels-last and have no gradient. NaN stays
within its row. Double backward is not supported.

Symbols: B images, N patches of an image, M memory slots, C slot width, k = ``top_k``.
"""

from .attention import neighbourhood_attention
from .common import DECOMPOSITIONS
from .lookup import gumbel_shrinkage, hard_shrinkage, memory_lookup
from .shortcut import masked_shortcut
from .windows import split_slots, window_lookup

__all__ = [
    "DECOMPOSITIONS",
    "gumbel_shrinkage",
    "hard_shrinkage",
    "masked_shortcut",
    "memory_lookup",
    "neighbourhood_attention",
    "split_slots",
    "window_lookup",
]
