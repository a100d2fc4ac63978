"""Where a GPU's time goes when it scores, and what changes of the network would give.

The levers add up in the order of the trials: biases, ReLU and residuals in the epilogue of cuDNN's
convolutions; the resize straight into the concatenation, in Triton; TF32 products outside the
kernels; ``torch.compile``. None of them is part of ``squid_fast``. *Noise* is the deviation of the
difference of scores, in deviations of the score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from squid_fast.experiments.benchmark import Benchmark, compare, figures, random_bundle
from squid_fast.inference import Scorer, convolution, network
from squid_fast.inference.calibration import rank_correlation
from squid_fast.inference.scores import PAPER_SCORE

from ..operations.timing import graph_seconds, tf32
from . import trials, up2

Network = Callable[[Tensor], Tensor]  # images to logits


def logits_of(scorer: Scorer) -> Network:
    """The network of a scorer as it is captured, errors of reconstruction included."""
    return lambda images: scorer.model(images, (PAPER_SCORE,))[2]


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

    def forward(
        self: network.Stage,
        x: Tensor,
        skip: Tensor | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        x = x.to(self.source)
        skip = None if skip is None else skip.to(self.source)
        if self.resizes:
            x = resize(x, skip)
        elif skip is not None:
            x = torch.cat([skip, x], dim=1)
        a = self.first(x).to(self.dtype)
        x = self.third(self.second(a), residual=a)
        return x if head is None else head(x.float())

    return forward


class Levers:
    """Timings and scores of a network on the same images."""

    def __init__(self, run: trials.Trials) -> None:
        self.run, self.device = run, run.device
        benchmark = Benchmark(random_bundle(trials.preset(run.rehearsal)), run.device)
        self.images = trials.images(4 if run.rehearsal else 1024, benchmark.bundle.model.image_size)
        self.batches = (2,) if run.rehearsal else (16, 64, 256, 1024)
        self.exact = benchmark.scorer("float32")
        self.scorer = self.exact if run.rehearsal else benchmark.scorer("bf16")
        with tf32(False):
            self.expected = self.scores(logits_of(self.exact))

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
        noise = float((found - self.expected).std() / self.expected.std())
        return [rank_correlation(self.expected, found), round(noise, 4)]

    def end_to_end(self) -> dict[str, float]:
        """Images/s by batch size and dtype of images in the host's memory."""
        contenders = {}
        for B in self.batches:
            for images in (self.images[:B], (self.images[:B] * 255).byte()):
                contenders[f"{B}, {images.dtype}"] = (B, partial(self.scorer.score, images))
        rows = figures(contenders, compare(contenders, 1 if self.run.rehearsal else 15))
        return {name: row["images_per_second"] for name, row in rows.items()}

    @torch.inference_mode()
    def kernels(self, net: Network) -> list[list[object]]:
        """The kernels of a batch of 256 that take longest."""
        images = self.images[:256].to(self.device)
        return trials.kernels(partial(net, images), self.device)

    def compiled(self, name: str) -> None:
        """Trials with the discriminator and then the generator compiled, at a batch of 256."""
        backend = "eager" if self.run.rehearsal else "inductor"
        compile = partial(torch.compile, dynamic=False, backend=backend)
        generator = self.scorer.model.generator
        discriminator = self.scorer.model.discriminators["instance"]
        logits = compile(lambda recon: discriminator.score(recon, "instance"))
        batches = self.batches[-2:-1] or self.batches
        nets = {"discriminator": generator, "generator too": compile(generator)}
        for parts, first in nets.items():

            def net(images: Tensor, first: Network = first) -> Tensor:
                return logits(first(images))

            self.run.attempt(f"{name}, {parts}: ms and images/s", self.rates, net, batches)


def make(run: trials.Trials) -> None:
    """Make the trials."""
    levers = Levers(run)
    net, plain = logits_of(levers.scorer), logits_of(levers.exact)
    run.attempt("float32 with TF32: rank correlation, noise", levers.noise, plain)
    run.attempt("as built: ms and images/s by batch", levers.rates, net)
    run.attempt("as built: rank correlation, noise", levers.noise, net)
    run.attempt("as built, from the host: images/s", levers.end_to_end)
    run.attempt("as built: kernels of a batch of 256", levers.kernels, net)

    def change(before: Tensor) -> float:
        return float((levers.scores(net) - before).abs().max() / before.std())

    epilogue: Callable[..., Tensor] = convolution_with_epilogue
    resize = up2.up2
    if run.rehearsal:  # what both do, by PyTorch
        epilogue, resize = convolution.FoldedConv.forward, up2.resized
    with patch.object(convolution.FoldedConv, "forward", epilogue):
        run.attempt("epilogues: ms and images/s by batch", levers.rates, net)
        run.attempt("epilogues: rank correlation, noise", levers.noise, net)
        before = levers.scores(net)
        with patch.object(network.Stage, "forward", stage_with_resize(resize)):
            run.attempt("and resize: ms and images/s by batch", levers.rates, net)
            run.attempt("and resize: largest change of a score", change, before)
            run.attempt("and resize: kernels of a batch of 256", levers.kernels, net)
            with tf32(True, products=True):
                run.attempt("and TF32 products: ms and images/s", levers.rates, net)
                run.attempt("and TF32 products: rank, noise", levers.noise, net)
            levers.compiled("and torch.compile")
    if not run.rehearsal:
        torch._dynamo.reset()
        levers.compiled("torch.compile alone")
