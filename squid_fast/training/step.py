"""One adversarial training step with a single generator forward (paper section 3.5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import Discriminator, MemoryQueue
from ..presets import Recipe
from .ema import EMA
from .losses import discriminator_loss, generator_losses


class Trainer:
    """Generator, discriminator and their optimisers, advanced one batch at a time.

    The published loop runs the whole generator twice on a batch that trains it. Here the
    discriminator learns from the detached result of the same forward that the generator learns
    from, and a batch for the discriminator alone computes neither teacher nor gradient graph.

    Args:
        generator, discriminator: modules on their device, perhaps wrapped for precision.
        backward: called with a loss in place of ``loss.backward()``.
        ema: moving average of the discriminator, updated at every step.
        frozen_discriminator: gives the logits that the generator learns from; by default the
            ``discriminator``, which several processes cannot call without training it.

    >>> from squid_fast import PRESETS, SQUID, Discriminator
    >>> pair, recipe = (SQUID(**PRESETS["small"].model), Discriminator(size=2)), Recipe()
    >>> trainer = Trainer(*pair, make_optimizers(*pair, recipe), recipe, Tensor.backward)
    >>> list(trainer.step(torch.rand(2, 1, 48, 48), 0))
    ['discriminator', 'reconstruction', 'adversarial', 'teacher', 'distillation']
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
        recipe: Recipe,
        backward: Callable[[Tensor], None],
        ema: EMA[Discriminator] | None = None,
        frozen_discriminator: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.generator_optimizer, self.discriminator_optimizer = optimizers
        self.recipe, self._backward, self._ema = recipe, backward, ema
        self._frozen_discriminator = frozen_discriminator or discriminator
        self._learning = [p for p in discriminator.parameters() if p.requires_grad]
        self._queues = [m for m in generator.modules() if isinstance(m, MemoryQueue)]

    def step(self, images: Tensor, index: int) -> dict[str, Tensor]:
        """Train on images [B, 1, H, W]; ``index`` counts batches and decides the generator's turn.

        Returns the losses as tensors on the device, so that nothing waits for them.
        """
        train_generator = index % self.recipe.n_critic == 0
        with torch.set_grad_enabled(train_generator):
            outputs = self.generator(images, teacher=train_generator)
        losses = {"discriminator": self._train_discriminator(images, outputs["recon"].detach())}
        if train_generator:
            losses |= self._train_generator(images, outputs)
        if self._ema is not None:
            self._ema.update()
        return losses

    def _train_discriminator(self, images: Tensor, recon: Tensor) -> Tensor:
        real_logits, recon_logits = self.discriminator(images), self.discriminator(recon)
        loss = discriminator_loss(real_logits, recon_logits, self.recipe)
        self.discriminator_optimizer.zero_grad()
        self._backward(loss)
        self.discriminator_optimizer.step()
        return loss.detach()

    def _train_generator(
        self, images: Tensor, outputs: dict[str, Tensor | None]
    ) -> dict[str, Tensor]:
        for parameter in self._learning:
            parameter.requires_grad_(False)
        assert outputs["recon"] is not None
        recon_logits = self._frozen_discriminator(outputs["recon"])
        terms = generator_losses(images, outputs, recon_logits, self.recipe)
        self.generator_optimizer.zero_grad()
        self._backward(torch.stack(list(terms.values())).sum())
        self.generator_optimizer.step()
        for parameter in self._learning:
            parameter.requires_grad_(True)
        for queue in self._queues:
            queue.update()
        return {name: term.detach() for name, term in terms.items()}


def make_optimizers(
    generator: nn.Module, discriminator: Discriminator, recipe: Recipe, capturable: bool = False
) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """The published Adams, fused: one pass over all parameters.

    ``capturable`` ones fit in a CUDA graph; their rates are tensors, see ``set_learning_rate``.

    >>> from squid_fast import PRESETS, SQUID, Discriminator
    >>> pair = SQUID(**PRESETS["small"].model), Discriminator(size=2)
    >>> [adam.param_groups[0]["lr"] for adam in make_optimizers(*pair, Recipe(lr=3e-3))]
    [0.003, 0.0001]
    """

    def rate(value: float) -> float | Tensor:
        device = next(generator.parameters()).device
        return torch.tensor(value, device=device) if capturable else value

    adam = partial(torch.optim.Adam, betas=recipe.betas, fused=True, capturable=capturable)
    eps, decay = recipe.generator_eps, recipe.weight_decay
    return (
        adam(generator.parameters(), rate(recipe.lr), eps=eps, weight_decay=decay),
        adam(discriminator.parameters(), rate(recipe.discriminator_lr)),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all parameters, in place where it is a tensor, which CUDA graphs read."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, perhaps of another device; a rate in a tensor stays in that tensor."""
    kept = ("lr", "capturable")  # the second is Adam's
    own = [{key: group[key] for key in kept if key in group} for group in optimizer.param_groups]
    rate = float(state["param_groups"][0]["lr"])  # all parameters have the same
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, own, strict=True):
        group.update(before)
    set_learning_rate(optimizer, rate)
