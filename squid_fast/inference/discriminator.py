"""A trained discriminator frozen for scoring: norms folded, weights packed for the kernels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm is no subclass of BatchNorm2d

from .. import ops
from ..modules import Discriminator, ScoreMode
from .convolution import fold_discriminator


class FrozenDiscriminator(nn.Module):
    """The scores [B] that a discriminator gives images [B, 1, H, W] in one mode.

    Args:
        fused: by ``ops.discriminator_score``, which needs no layer of its own for a norm; else by
            ``Discriminator.score``, which on a CPU gives the same bits as it always did.
    """

    def __init__(self, discriminator: Discriminator, mode: ScoreMode, fused: bool) -> None:
        super().__init__()
        self.mode, self.fused = mode, fused
        self.plain = fold_discriminator(discriminator) if mode == "running" else discriminator
        if fused:
            weights = [conv.weight.detach() for conv in self._convolutions()]
            packed = ops.pack_discriminator(weights, self.plain.regressor.weight.detach()[0])
            for i, part in enumerate(packed):  # not saved, since they follow from the weights
                self.register_buffer(f"packed_{i}", part, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if not self.fused:
            return self.plain.score_unchecked(images, self.mode)
        convs = self._convolutions()
        norms = [layer for layer in self.plain.conv_model if isinstance(layer, _BatchNorm)]
        # Behind a convolution with a norm of its own the norm's bias takes the place of its bias.
        biased: list[nn.Conv2d | _BatchNorm] = [convs[0], *norms] if norms else [*convs]
        return ops.discriminator_score(
            images,
            [conv.weight.detach() for conv in convs],
            [layer.bias.detach() for layer in biased if layer.bias is not None],
            self.plain.regressor.weight.detach()[0],
            self.plain.regressor.bias.detach(),
            scales=[norm.weight.detach() for norm in norms],
            eps=norms[0].eps if norms else 0.0,
            packed=list(self.buffers(recurse=False)),
        )

    def _convolutions(self) -> list[nn.Conv2d]:
        return [layer for layer in self.plain.conv_model if isinstance(layer, nn.Conv2d)]
