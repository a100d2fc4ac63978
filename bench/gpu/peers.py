"""The published way of scoring beside squid_fast: what TF32, bf16 and ``torch.compile`` give it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from squid_fast import reference
from squid_fast.experiments.benchmark import Benchmark, compare, figures, random_bundle
from squid_fast.experiments.published import published_way

from . import trials


def make(run: trials.Trials) -> None:
    """Make the trials."""
    device = run.device
    bundle = random_bundle(trials.preset(run.rehearsal))
    batches = (2,) if run.rehearsal else (1, 16, 256)
    images = trials.images(batches[-1], bundle.model.image_size).to(device)
    published = published_way(bundle, device)
    published_in_tf32 = published_way(bundle, device, in_tf32=True)
    ours = Benchmark(bundle, device).scorer("float32")

    def rates(call: Callable[[Tensor], object]) -> dict[str, float]:
        """Images/s by batch size, of images on the device."""
        contenders = {f"{B}": (B, partial(call, images[:B])) for B in batches}
        rows = figures(contenders, compare(contenders, 1 if run.rehearsal else 8))
        return {name: row["images_per_second"] for name, row in rows.items()}

    def in_bf16(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return published(images).float()

    def agreement() -> dict[str, float]:
        """How far scores lie apart, in their standard deviations."""
        theirs, own = published(images[:32]), ours.score(images[:32]).raw
        apart = (theirs - own).abs() / theirs.std()
        return {"median": float(apart.median()), "largest": float(apart.max())}

    def compiled() -> dict[str, float]:
        """Both published networks compiled, in channels-last layout and bf16."""
        model = reference.SQUID(**bundle.model.config)
        model.load_state_dict(bundle.model.state_dict())
        discriminator = reference.Discriminator(bundle.discriminator.size)
        discriminator.load_state_dict(bundle.discriminator.state_dict())
        last = torch.channels_last
        generate, measure = (
            torch.compile(net.eval().to(device, memory_format=last), mode="reduce-overhead")
            for net in (model, discriminator)
        )

        @torch.no_grad()
        def score(images: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                recon = generate(images.contiguous(memory_format=last))["recon"].clone()
                return reference.discriminator_logits(measure, recon).float().cpu()

        return rates(score)

    run.attempt("published, float32: images/s", rates, published)
    run.attempt("published, TF32: images/s", rates, published_in_tf32)
    run.attempt("published, autocast to bf16: images/s", rates, in_bf16)
    run.attempt("squid_fast, float32: images/s", rates, ours.score)
    run.attempt("float32 scores apart, in standard deviations", agreement)
    if not run.rehearsal:  # where compiling would take minutes
        run.attempt("published, compiled, autocast to bf16: images/s", compiled)
