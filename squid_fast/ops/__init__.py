"""The operations of SQUID as PyTorch custom operators, one file per operation.

Each public function checks its arguments and calls an operator ``torch.ops.squid_fast.<name>``.
Beside the operator stand its PyTorch implementation ``_<name>_cpu``, a fake implementation (so that
``torch.compile`` and export see through it) and a gradient, which is an operator too. An operator
runs the Triton kernel of its name where ``kernels.dispatch`` says that it serves, else the PyTorch
implementation: on every CPU, in float64, and for the shapes that it gives its reasons for. Nothing
synchronises with the host. NaN stays within its row, or its image. There is no double backward.

Scoring has operations of its own, without a gradient: ``stem``, ``split_linear``,
``window_lookup``, ``cell_convolution``, ``reconstruct`` and ``discriminator_score``.

Symbols: B images, N patches of an image, M memory slots, C slot width, k = ``top_k``.
"""

from .attention import neighbourhood_attention
from .common import DECOMPOSITIONS, split
from .convolution import cell_convolution
from .discriminator import discriminator_score, pack_discriminator
from .images import reconstruct, stem
from .linear import split_linear
from .lookup import gumbel_shrinkage, hard_shrinkage, memory_lookup
from .norm import batch_norm
from .shortcut import masked_shortcut
from .upsample import upsample_concat
from .windows import window_lookup

__all__ = [
    "DECOMPOSITIONS",
    "batch_norm",
    "cell_convolution",
    "discriminator_score",
    "gumbel_shrinkage",
    "hard_shrinkage",
    "masked_shortcut",
    "memory_lookup",
    "neighbourhood_attention",
    "pack_discriminator",
    "reconstruct",
    "split",
    "split_linear",
    "stem",
    "upsample_concat",
    "window_lookup",
]
