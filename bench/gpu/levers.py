"""Where a GPU's time goes when it scores, and what changes of the network would give.

The levers add up in the order of the trials: biases, ReLU and residuals in the epilogue of cuDNN's
convolutions; the resize straight into the concatenation, in Triton; TF32 products outside the
kernels; ``torch.compile``. None of them is part of ``squid_fast``. *Noise* is the deviation of the
difference of scores, in deviations of the score.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from squid_fast.experiments.benchmark import compare, figures, random_bundle
from squid_fast.inference import Scorer, convolution, network
from squid_fast.inference.calibration import rank_correlation
from squid_fast.inference.scores import PAPER_SCORE

from ..operations.timing import graph_seconds
from . import trials, up2

Network = Callable[[Tensor], Tensor]  # images to logits


def logits_of(scorer: Scorer) -> Network:
    """The network of a scorer as it is captured, errors of reconstruction included."""
    return lambda images: scorer.model(images, (PAPER_SCORE,))[2]


def parts_of(scorer: Scorer) -> tuple[nn.Module, Network]:
    """Its frozen generator, and what makes logits of reconstructions."""
    discriminator = scorer.model.discriminators["instance"]
    return scorer.model.generator, lambda recon: discriminator.score(recon, "instance")


def convolution_with_epilogue(
    self: convolution.FoldedConv, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """``FoldedConv.forward`` in one call of cuDNN."""
    where = self.stride, self.padding, [1, 1], 1
    if residual is None:
        return torch.cudnn_convolution_relu(x, self.weight, self.bias, *where)
    return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, self.bias, *where)


def stage_with_resize(resize: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    """``Stage.forward`` with another resize."""

    def forward(self: network.Stage, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x.to(self.source)
        skip = None if skip is None else skip.to(self.source)
        if self.resizes:
            x = resize(x, skip)
        elif skip is not None:
            x = torch.cat([skip, x], dim=1)
        a = self.first(x).to(self.dtype)
        return self.third(self.second(a), residual=a)

    return forward


class Levers:
    """Timings and scores of a network on the same images."""

    def __init__(self, run: trials.Trials) -> None:
        self.run, self.device = run, run.device
        bundle = random_bundle(trials.preset(run.rehearsal))
        self.images = trials.images(4 if run.rehearsal else 1024, bundle.model.image_size)
        self.batches = (2,) if run.rehearsal else (16, 64, 256, 1024)
        self.scorers = {name: trials.scorer(bundle, self.device, name) for name in self.precisions}
        with trials.tf32(False):
            self.exact = self.scores(logits_of(self.scorers["float32"]))

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("float32",) if self.run.rehearsal else ("float32", "bf16")

    @torch.inference_mode()
    def rates(self, net: Network, batches: Sequence[int] = ()) -> dict[int, list[float]]:
        """Milliseconds of a batch and images/s, by batch size, without the way to the device."""
        found = {}
        for B in batches or self.batches:
            seconds = graph_seconds(partial(net, self.images[:B].to(self.device)), self.device)
            found[B] = [round(1e3 * seconds, 3), round(B / seconds)]
        return found

    @torch.inference_mode()
    def scores(self, net: Network) -> Tensor:
        """Logits of 256 images."""
        parts = self.images[:256].split(32)
        return torch.cat([net(part.to(self.device)).float().cpu().flatten() for part in parts])

    def noise(self, net: Network) -> list[float]:
        """Rank correlation with float32, and the noise."""
        found = self.scores(net)
        noise = float((found - self.exact).std() / self.exact.std())
        return [rank_correlation(self.exact, found), round(noise, 4)]

    def end_to_end(self, scorer: Scorer) -> dict[str, float]:
        """Images/s by batch size and dtype of images in the host's memory."""
        contenders = {}
        for B in self.batches:
            for images in (self.images[:B], (self.images[:B] * 255).byte()):
                contenders[f"{B}, {images.dtype}"] = (B, partial(scorer.score, images))
        rows = figures(contenders, compare(contenders, 1 if self.run.rehearsal else 15))
        return {name: row["images_per_second"] for name, row in rows.items()}

    @torch.inference_mode()
    def kernels(self, net: Network) -> list[list[object]]:
        """The kernels of a batch of 256 that take longest."""
        images = self.images[:256].to(self.device)
        return trials.kernels(partial(net, images), self.device)


def main() -> None:
    """Make the trials; exit with 1 if one failed."""
    run = trials.Trials("levers", trials.parse(__doc__))
    levers = Levers(run)
    exact, scorer = (levers.scorers[levers.precisions[i]] for i in (0, -1))
    net = logits_of(scorer)
    plain = logits_of(exact)
    run.attempt("float32 with TF32: rank correlation, noise", lambda: levers.noise(plain))
    run.attempt("as built: ms and images/s by batch", lambda: levers.rates(net))
    run.attempt("as built: rank correlation, noise", lambda: levers.noise(net))
    run.attempt("as built, from the host: images/s", lambda: levers.end_to_end(scorer))
    run.attempt("as built: kernels of a batch of 256", lambda: levers.kernels(net))

    epilogue: Callable[..., Tensor] = convolution_with_epilogue
    resize = up2.up2
    if run.rehearsal:  # what both do, by PyTorch
        epilogue, resize = convolution.FoldedConv.forward, up2.resized
    with patch.object(convolution.FoldedConv, "forward", epilogue):
        run.attempt("epilogues: ms and images/s by batch", lambda: levers.rates(net))
        run.attempt("epilogues: rank correlation, noise", lambda: levers.noise(net))
        before = levers.scores(net)
        with patch.object(network.Stage, "forward", stage_with_resize(resize)):
            run.attempt("and resize: ms and images/s by batch", lambda: levers.rates(net))
            run.attempt(
                "and resize: largest change of a score",
                lambda: float((levers.scores(net) - before).abs().max() / before.std()),
            )
            run.attempt("and resize: kernels of a batch of 256", lambda: levers.kernels(net))
            with trials.tf32(True, products=True):
                run.attempt("and TF32 products: ms and images/s", lambda: levers.rates(net))
                run.attempt("and TF32 products: rank, noise", lambda: levers.noise(net))
            compiled(levers, scorer, "and torch.compile")
    torch._dynamo.reset()
    compiled(levers, scorer, "torch.compile alone")
    sys.exit(bool(run.failures))


def compiled(levers: Levers, scorer: Scorer, name: str) -> None:
    """Trials with the discriminator and then the generator compiled, at a batch of 256."""
    backend = "eager" if levers.run.rehearsal else "inductor"
    compile = partial(torch.compile, dynamic=False, backend=backend)
    generator, logits = parts_of(scorer)
    fast_logits, fast_generator = compile(logits), compile(generator)
    batches = levers.batches[-2:-1] or levers.batches
    levers.run.attempt(
        f"{name}, discriminator: ms and images/s",
        lambda: levers.rates(lambda images: fast_logits(generator(images)), batches),
    )
    levers.run.attempt(
        f"{name}, generator too: ms and images/s",
        lambda: levers.rates(lambda images: fast_logits(fast_generator(images)), batches),
    )


if __name__ == "__main__":
    main()
