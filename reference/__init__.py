"""SQUID in plain PyTorch: the text to read in order to understand the method.

Every file states one idea and opens with the section of the paper that it implements
(Xiang et al., "SQUID: Deep Feature In-Painting for Unsupervised Anomaly Detection", CVPR 2023,
arXiv 2111.13495). Nothing here is fast: loops run over patches, intermediate tensors are kept,
and everything works in float64. The fast implementation is tested against it.

Reading order: ``lookup`` -> ``memory`` -> ``attention`` -> ``shortcut`` -> ``inpaint`` ->
``norm`` -> ``upsample`` -> ``blocks`` -> ``squid`` -> ``discriminator`` -> ``losses`` ->
``score``.
"""

from .attention import neighbourhood_attention
from .discriminator import Discriminator
from .inpaint import InpaintBlock
from .lookup import gumbel_shrinkage, hard_shrinkage, memory_lookup
from .losses import discriminator_loss, generator_loss
from .memory import MemoryMatrix, MemoryQueue
from .norm import batch_norm
from .score import anomaly_score, discriminator_logits, z_score
from .shortcut import masked_shortcut
from .squid import SQUID
from .upsample import upsample_concat

__all__ = [
    "SQUID",
    "Discriminator",
    "InpaintBlock",
    "MemoryMatrix",
    "MemoryQueue",
    "anomaly_score",
    "batch_norm",
    "discriminator_logits",
    "discriminator_loss",
    "generator_loss",
    "gumbel_shrinkage",
    "hard_shrinkage",
    "masked_shortcut",
    "memory_lookup",
    "neighbourhood_attention",
    "upsample_concat",
    "z_score",
]
