"""Triton kernels of SQUID's operations and their launchers, one file per operation.

A file reads from top to bottom: constants, device helpers, kernels, configuration, launchers. The
launchers ``forward`` and ``backward`` take the arguments of the operators in ``squid_fast.ops``,
which asks ``dispatch`` whether a kernel serves a call. Triton is imported with the first kernel
that is needed, so that a machine without it, or without a GPU, never pays for it.

Symbols: B images, N patches of an image, M memory slots, C slot width, k = ``top_k``.
"""

from .dispatch import use

__all__ = ["use"]
