"""Where a GPU's time goes when it scores, and what each piece of ours gives.

The scorer is measured as it is, then with each of our pieces replaced by what PyTorch has: every
kernel that ``kernels.dispatch`` lets serve it, and the convolutions with an epilogue; then with all
of them replaced, and each of these two compiled by ``torch.compile``. *Noise* is the deviation of
the difference to float32, in deviations of the score. The weights are random.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from squid_fast.experiments.benchmark import Benchmark, compare, figures, random_bundle
from squid_fast.inference import compiler, model
from squid_fast.inference.calibration import rank_correlation
from squid_fast.inference.scores import PAPER_SCORE
from squid_fast.kernels import dispatch
from squid_fast.utils.devices import Backend
from squid_fast.utils.tf32 import tf32

from ..operations.timing import graph_seconds
from . import trials

Network = Callable[[Tensor], Tensor]  # images to logits

_RULE = "serves_"  # the functions of dispatch that say whether a kernel serves a call
EPILOGUES = "convolutions with an epilogue"


def kernel_names() -> list[str]:
    """Our kernels, by the names of their rules."""
    return [name.removeprefix(_RULE) for name in vars(dispatch) if name.startswith(_RULE)]


@contextmanager
def replaced(pieces: Collection[str]) -> Iterator[None]:
    """PyTorch has to do what these pieces do, for scorers that are made inside."""
    with ExitStack() as stack:
        for name in pieces:
            if name == EPILOGUES:
                place = model, "use_cudnn", lambda network: None
            else:
                place = dispatch, _RULE + name, lambda *arguments, **options: False
            stack.enter_context(patch.object(*place))
        yield


def kernels_used(call: Callable[[], object], asked: bool = False) -> list[str]:
    """The kernels that serve a call or, with ``asked``, that it asks for."""
    found: dict[str, None] = {}

    def noting(name: str, rule: Callable[..., bool], *arguments: Any, **options: Any) -> bool:
        serves = rule(*arguments, **options)
        if serves or asked:
            found[name] = None
        return serves

    with ExitStack() as stack:
        for name in kernel_names():
            noted = partial(noting, name, getattr(dispatch, _RULE + name))
            stack.enter_context(patch.object(dispatch, _RULE + name, noted))
        call()
    return list(found)


class Levers:
    """Timings and scores of the network on the same images."""

    def __init__(self, run: trials.Trials) -> None:
        self.run, self.device = run, run.device
        self.benchmark = Benchmark(random_bundle(trials.preset(run.rehearsal)), run.device)
        side = self.benchmark.bundle.model.image_size
        self.images = trials.images(4 if run.rehearsal else 1024, side)
        self.batches = (2,) if run.rehearsal else (1, 16, 64, 256, 1024)
        self.large = self.batches[-2:-1] or self.batches  # 256
        self.precision = "float32" if run.rehearsal else "bf16"
        self.expected = self.scores(self.network("float32"))

    def network(self, precision: str | None = None) -> Network:
        """A scorer's network as it is captured, errors of reconstruction included."""
        scorer = self.benchmark.scorer(precision or self.precision)
        return lambda images: scorer.model(images, (PAPER_SCORE,))[2]

    @torch.inference_mode()
    def pieces(self) -> list[str]:
        """Our pieces that the network makes use of; in a rehearsal, that it asks for."""
        images = self.images[: self.large[0]].to(self.device)
        return [EPILOGUES, *kernels_used(partial(self.network(), images), self.run.rehearsal)]

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

    def without(self, pieces: Collection[str]) -> dict[str, Any]:
        """Rates, rank correlation and noise with these pieces replaced."""
        with replaced(pieces):
            net = self.network()
            return {"rates": self.rates(net, self.batches[1::2]), "noise": self.noise(net)}

    def compiled(self, batch: int, pieces: Collection[str] = ()) -> dict[int, list[float]]:
        """Rates at a batch size, compiled, with these pieces replaced."""
        with replaced(pieces), ExitStack() as stack:
            if self.run.rehearsal:  # compiling would take minutes, and knows nothing of oneDNN
                stack.enter_context(patch.object(compiler, "_COMPILER", "eager"))
                stack.enter_context(patch.object(model, "has_onednn", lambda: False))
            return self.rates(compiler.compiled(self.network()), (batch,))

    def end_to_end(self, backend: Backend = "eager") -> dict[str, float]:
        """Images/s by batch size and dtype of images in the host's memory."""
        scorer = self.benchmark.scorer(self.precision, backend)
        contenders = {}
        for B in self.batches:
            for images in (self.images[:B], (self.images[:B] * 255).byte()):
                contenders[f"{B}, {images.dtype}"] = (B, partial(scorer.score, images))
        rows = figures(contenders, compare(contenders, 1 if self.run.rehearsal else 15))
        return {name: row["images_per_second"] for name, row in rows.items()}

    @torch.inference_mode()
    def kernels(self, net: Network) -> list[list[object]]:
        """The kernels of a batch of 256 that take longest."""
        images = self.images[: self.large[0]].to(self.device)
        return trials.kernels(partial(net, images), self.device)


def make(run: trials.Trials) -> None:
    """Make the trials."""
    with tf32(False):
        levers = Levers(run)
        net = levers.network()
        run.attempt("as it is: ms and images/s by batch", levers.rates, net)
        run.attempt("as it is: rank correlation, noise", levers.noise, net)
        run.attempt("as it is, from the host: images/s", levers.end_to_end)
        run.attempt("as it is: kernels of a batch of 256", levers.kernels, net)
        pieces = levers.pieces()
        run.attempt("without any of our pieces", levers.without, pieces)
        for piece in pieces:
            run.attempt(f"without {piece}", levers.without, [piece])
        others = [] if run.rehearsal else [16, 64, 1024, 1]
        for batch in (*levers.large, *others):
            run.attempt(f"compiled, batch {batch}", levers.compiled, batch)
            run.attempt(
                f"compiled, without any of our pieces, batch {batch}",
                levers.compiled, batch, pieces,
            )  # fmt: skip
