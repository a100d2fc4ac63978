"""Triton kernels of the five operations, one file per operation, and their launchers.

None is shipped yet: every device runs the PyTorch implementations of ``squid_fast.ops``.
"""
