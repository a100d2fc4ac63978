"""Small models, image sets and scorers that tests share."""

from __future__ import annotations

import copy
import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from squid_fast import SQUID, Bundle, Discriminator, Scorer
from squid_fast.data import ImageSet
from squid_fast.inference import calibrate
from squid_fast.inference.scores import PAPER_SCORE
from squid_fast.modules import discriminator_size
from squid_fast.utils.devices import ScoringPrecision

SIDE = 48
TINY: dict[str, Any] = {
    "num_in_ch": 1,
    "features_root": 4,
    "shrink_thres": 3,
    "num_slots": 12,
    "level": 2,
    "memory_channel": 144,
    "dist": True,
    "initial_combine": 1,
    "mem_num_slots": 6,
    "ops": ["concat", "none"],
}
"""Arguments of a model for images of ``SIDE`` x ``SIDE`` without memories in its decoder."""


def decoder_memory(kind: str, multiplier: int, num_memory: int) -> list[dict[str, Any] | None]:
    """The argument of a model of two levels with memories in the coarser one."""
    return [None, {"type": kind, "multiplier": multiplier, "num_memory": num_memory}]


DECODER_MEMORY = decoder_memory("MemoryMatrixBlockV3", 144, 4)
"""What gives it one: ``tiny_squid(decoder_memory=DECODER_MEMORY)``."""


def tiny_squid(**changes: Any) -> SQUID:
    """A model in training mode, with the same weights at every call."""
    torch.manual_seed(0)
    return SQUID(**TINY | changes)


def trained_squid(**changes: Any) -> SQUID:
    """A wider model, of 64 x 64, in evaluation mode, whose statistics and queues are of images."""
    model, generator = _trained_squid(json.dumps(changes))
    torch.set_rng_state(generator)  # as if it had been made now
    return copy.deepcopy(model)


@cache
def _trained_squid(changes: str) -> tuple[SQUID, Tensor]:
    wider = {"features_root": 16, "memory_channel": 1024, "mem_num_slots": 10}
    model = tiny_squid(**wider | json.loads(changes))
    side = model.image_size
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(6, model.num_in_ch, side, side))
            model.inpaint_block.memory.update()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
        model.eval()
        head = model.out_conv.conv
        # Else all reconstructions look the same.
        logits = torch.logit(model(torch.rand(4, model.num_in_ch, side, side))["recon"].double())
        head.weight /= float(logits.std())
        head.bias.sub_(float(logits.mean())).div_(float(logits.std()))
    return model, torch.get_rng_state()


def open_masks(*models: nn.Module) -> None:
    """Let the shortcuts in-paint everywhere, so that training draws no random numbers."""
    for model in models:
        for module in model.modules():
            if hasattr(module, "mask_ratio"):
                module.mask_ratio = 1.0


def image_set(n: int, side: int = SIDE, *, anomalous: int = 0, seed: int = 0) -> ImageSet:
    """Noise; the first ``anomalous`` images are labelled so."""
    pixels = torch.randint(256, (n, 1, side, side), generator=_generator(seed))
    return labelled(pixels.to(torch.uint8), anomalous)


def image_batch(n: int, side: int = SIDE, *, seed: int = 0) -> Tensor:
    """The pixels of such a set as a model takes them, float32 in [0, 1]."""
    return image_set(n, side, seed=seed).batch(slice(None))


def smooth_image_set(n: int, side: int, *, seed: int = 0) -> ImageSet:
    """Smooth images that differ, so that scores have something to rank."""
    coarse = torch.rand(n, 1, 6, 6, generator=_generator(seed))
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return labelled((smooth.clamp(0, 1) * 255).to(torch.uint8))


def labelled(pixels: Tensor, anomalous: int = 0) -> ImageSet:
    """A set of these pixels, uint8 ``[n, 1, side, side]``, with numbers for paths."""
    n = len(pixels)
    return ImageSet(pixels, (torch.arange(n) < anomalous).long(), [str(i) for i in range(n)])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained_discriminator(images: Tensor) -> Discriminator:
    """In evaluation mode, with the statistics of these images."""
    discriminator = Discriminator(discriminator_size(images.shape[-1]))
    with torch.no_grad():
        discriminator(images)
    return discriminator.eval()


def tiny_pair() -> tuple[SQUID, Discriminator]:
    """A model and a discriminator in evaluation mode, whose statistics and queues are of images."""
    model, discriminator = tiny_squid(), Discriminator(2)
    with torch.no_grad():
        model.out_conv.conv.weight *= 30  # else all reconstructions look the same to float32
        discriminator(model(image_batch(8))["recon"])
    model.inpaint_block.memory.update()
    return model.eval(), discriminator.eval()


def tiny_bundle(score: str = PAPER_SCORE) -> Bundle:
    """Such a pair, calibrated in float32 with a false-positive rate of 0.1."""
    pair = tiny_pair()
    calibration = calibrate(*pair, image_set(30), image_set(40, seed=5), 0.1, "float32", "cpu")
    return Bundle(*pair, calibration, score, about={"preset": "test"})


def scorer_of(
    bundle: Bundle,
    score: str | None = None,
    precision: ScoringPrecision = "float32",
    device: str = "cpu",
) -> Scorer:
    """The scorer of a bundle, of its own score unless named."""
    pair = bundle.model, bundle.discriminator
    return Scorer(*pair, bundle.calibration, score or bundle.score, precision, device)


class MeanScorer:
    """A scorer for screening: the raw score is the mean grey level, 0 to 255.

    The z-score is ten times the mean of pixels in [0, 1], the reconstruction half as bright.
    ``batches`` are the numbers of images that it was given.
    """

    score_name = "mean"
    threshold = 5.0
    false_positive_rate = 0.05
    fingerprint = "mean"

    def __init__(self, image_size: int = 8) -> None:
        self.image_size = image_size
        self.batches: list[int] = []

    def prefetch(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images

    def score(self, images: Tensor, reconstruction: bool = False) -> SimpleNamespace:
        assert images.shape[1:] == (1, self.image_size, self.image_size)
        self.batches.append(len(images))
        levels = images if images.dtype == torch.uint8 else images * 255
        raw = levels.float().mean(dim=(1, 2, 3))
        z = raw / 25.5
        return SimpleNamespace(
            raw=raw,
            z_score=z,
            anomaly_score=z.sigmoid(),
            reconstruction=levels / 510 if reconstruction else None,
        )
