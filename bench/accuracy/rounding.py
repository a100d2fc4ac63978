"""What each rounding of a GPU's bf16 path does to the ranking, emulated on a CPU.

The network runs in float32, and its tensors are rounded where a GPU rounds them: to bf16, with 8
bits, or for some products to TF32, with 11. Sums of products are in float32, as in tensor cores.
Each rounding is made alone, left out alone, and joined with others as in the ways of scoring that
there are. *Noise* is the deviation of the difference to float32, in deviations of the score.
Figures go to ``rounding.json``; a run that was cut goes on with the rows that are missing.

A GPU has been compared with float32 by random weights only. With these the emulation comes near, on
32 smooth fields: to a noise of 0.277 with PyTorch's operations, where an H200 had 0.272, and of
0.219 with cuDNN's epilogue, where it had 0.239; to rank correlations of 0.946 and 0.967, where it
had 0.954 and 0.971.
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squid_fast import Bundle, Scorer, load_bundle, ops
from squid_fast.data import ImageSet, find_records
from squid_fast.inference.calibration import rank_correlation
from squid_fast.inference.convolution import FoldedConv, fold
from squid_fast.inference.scores import PAPER_SCORE, SCORES
from squid_fast.inference.stages import NARROW
from squid_fast.metrics import image_auroc
from squid_fast.modules import SQUID, Discriminator
from squid_fast.modules.unet import DoubleConv, Up
from squid_fast.utils.devices import choose_layout, has_fast_bf16, to_layout

from ..arguments import add_data, add_option, add_output, add_threads
from ..measurements import RESULTS, Results
from .data import held_out

ROUNDINGS = {
    "weights": "weights of the stages to bf16",
    "bias": "their folded biases to bf16",
    "convolution": "what a convolution gives to bf16, before its bias is added",
    "sum": "the sum with the bias to bf16, before the residual is added",
    "map": "what a convolution hands on to bf16, but for the last",
    "resize": "resized maps to bf16",
    "answer": "answers of in-painting and memories to bf16",
    "last": "the last map to bf16, in front of the head",
    "bottleneck": "inputs and weights of the bottleneck's convolutions to TF32",
    "discriminator": "inputs and weights of the discriminator's convolutions to TF32",
}
"""What a GPU rounds when it scores in bf16 with PyTorch's own operations and default settings."""

OTHERS = {
    "bottleneck cut": "the bottleneck's to TF32, by cutting bits off",
    "discriminator cut": "the discriminator's to TF32, by cutting bits off",
    "discriminator split": "the discriminator's to sums of two bf16, in three products",
    "cuDNN's bias": "the folded biases to bf16 of the convolutions that no kernel of ours makes",
}
"""Roundings in place of some of those: how a GPU makes TF32 is not documented for every kernel."""

PLAIN = "PyTorch's operations"
_EPILOGUE = ROUNDINGS.keys() - {"convolution", "sum"}
_MENDED = _EPILOGUE - {"bottleneck", "discriminator"}
_CUT = {"bottleneck cut", "discriminator cut"}
WAYS = {
    PLAIN: ROUNDINGS.keys(),
    "the same, TF32 cut off": ROUNDINGS.keys() - {"bottleneck", "discriminator"} | _CUT,
    "bias and residual in cuDNN's epilogue": _EPILOGUE,
    "and the bottleneck in float32": _EPILOGUE - {"bottleneck"},
    "and the discriminator in split bf16": _MENDED | {"discriminator split"},
    "and the discriminator in float32": _MENDED,
    "and the head in the last epilogue": _MENDED - {"last"},
    "and resizes in the next convolution": _MENDED - {"last", "resize", "bias"} | {"cuDNN's bias"},
    "and biases in float32": _MENDED - {"last", "resize", "bias"},
}
"""Ways of scoring by what they round, each but the first two a step from the one before it."""

FLOAT32, ON_CPU = "the scorer in float32", "the scorer in bf16 on this CPU"
_BATCH = 8


def to_bf16(x: Tensor) -> Tensor:
    """The nearest bf16, of two the even one, as float32."""
    return x.bfloat16().float()


def to_tf32(x: Tensor, cut: bool = False) -> Tensor:
    """The nearest float32 with 10 bits of mantissa, of two the one farther from zero.

    That is how ``cvt.rna.tf32.f32`` rounds, by which kernels prepare operands. With ``cut`` the 13
    other bits are dropped, as tensor cores do with operands that nothing has prepared.
    """
    bits = x.view(torch.int32)
    rounded = ((bits if cut else bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def rounded(x: Tensor, name: str, chosen: Collection[str]) -> Tensor:
    """The tensor in bf16 if that rounding is chosen."""
    return to_bf16(x) if name in chosen else x


class RoundedDoubleConv(nn.Module):
    """``DoubleConv`` with its norms folded in; of images the first convolution is in float32.

    Kernels of ours make the first convolution behind a resize, and narrow ones: see ``CellConv``.
    """

    def __init__(
        self,
        block: DoubleConv,
        chosen: Collection[str],
        image: bool = False,
        output: str = "map",
        resizes: bool = False,
    ) -> None:
        super().__init__()
        conv1, norm1, _ = block.conv1
        conv2, norm2, _, conv3, norm3 = block.conv2
        self.convs = nn.ModuleList([fold(conv1, norm1), fold(conv2, norm2), fold(conv3, norm3)])
        self.chosen, self.output = chosen, output
        self.inside: list[Collection[str]] = [() if image else chosen, chosen, chosen]
        narrow = conv3.out_channels <= NARROW
        ours = (resizes, narrow, narrow)
        for conv, inside, own in zip(self.convs, self.inside, ours, strict=True):
            conv.weight = rounded(conv.weight, "weights", inside)
            conv.bias = rounded(conv.bias, "bias", inside)
            if not own:
                conv.bias = rounded(conv.bias, "cuDNN's bias", inside)

    def forward(self, x: Tensor) -> Tensor:
        a = self._convolve(0, x)
        return self._convolve(2, self._convolve(1, a), a, self.output)

    def _convolve(
        self, i: int, x: Tensor, residual: Tensor | None = None, output: str = "map"
    ) -> Tensor:
        conv, inside = self.convs[i], self.inside[i]
        x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
        x = rounded(x, "convolution", inside) + conv.bias[:, None, None]
        if residual is not None:
            x = rounded(x, "sum", inside) + residual
        return rounded(F.relu(x), output, self.chosen)


class RoundedUp(nn.Module):
    """``Up`` with a convolution that rounds."""

    def __init__(self, up: Up, chosen: Collection[str], output: str) -> None:
        super().__init__()
        self.concat, self.chosen = up.op == "concat", chosen
        self.conv = RoundedDoubleConv(up.conv, chosen, output=output, resizes=not self.concat)

    def forward(self, x: Tensor, skip: Tensor, num_patch: int = 1) -> Tensor:
        x = rounded(ops.upsample_concat(x, num_patch=num_patch), "resize", self.chosen)
        return self.conv(torch.cat([skip, x], dim=1) if self.concat else x)


class RoundedConv(nn.Module):
    """A convolution, and ReLU if it is a folded one, of which a GPU rounds the operands."""

    def __init__(self, conv: nn.Conv2d | FoldedConv, name: str, chosen: Collection[str]) -> None:
        super().__init__()
        self.conv, self.relu = conv, isinstance(conv, FoldedConv)
        self.split = f"{name} split" in chosen
        self.cut, self.exact = f"{name} cut" in chosen, name not in chosen

    def forward(self, x: Tensor) -> Tensor:
        weight, where = self.conv.weight, (self.conv.stride, self.conv.padding)
        if self.split:
            high, part = to_bf16(x), to_bf16(weight)
            both = high + to_bf16(x - high)
            x = F.conv2d(both, part, None, *where)
            x += F.conv2d(high, to_bf16(weight - part), None, *where)
        elif self.exact and not self.cut:
            x = F.conv2d(x, weight, None, *where)
        else:
            x = F.conv2d(to_tf32(x, self.cut), to_tf32(weight, self.cut), None, *where)
        assert self.conv.bias is not None
        x = x + self.conv.bias[:, None, None]
        return F.relu(x) if self.relu else x


def rounded_generator(model: SQUID, chosen: Collection[str]) -> SQUID:
    """The generator in evaluation mode, with the chosen roundings."""
    net = copy.deepcopy(model).float().eval().requires_grad_(False)
    net.in_conv = RoundedDoubleConv(net.in_conv.conv, chosen, image=True)
    for i, down in enumerate(net.down_blocks):
        net.down_blocks[i] = RoundedDoubleConv(down.mpconv, chosen)
    for i, up in enumerate(net.up_blocks):
        deep = net.level - 1 - i
        asks = not isinstance(net.memory_blocks[deep], nn.Identity)
        output = "map" if deep or asks else "last"
        net.up_blocks[i] = RoundedUp(up, chosen, output)

    def answer(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return rounded(output, "answer", chosen)

    # The decoder's steps take answers in bf16, the head behind the last memory in float32.
    for block in (net.inpaint_block, *net.memory_blocks[1:]):
        if not isinstance(block, nn.Identity):
            block.register_forward_hook(answer)
    if not isinstance(net.inpaint_block, nn.Identity):
        for name in ("bottleneck_conv1", "bottleneck_conv2"):
            conv, norm, _ = getattr(net.inpaint_block, name)
            folded = RoundedConv(fold(conv, norm), "bottleneck", chosen)
            setattr(net.inpaint_block, name, folded)
    return to_layout(net, choose_layout(model.config["features_root"]))


def rounded_discriminator(discriminator: Discriminator, chosen: Collection[str]) -> Discriminator:
    """The discriminator in evaluation mode, with the chosen roundings."""
    net = copy.deepcopy(discriminator).float().eval().requires_grad_(False)
    for i, layer in enumerate(net.conv_model):
        if isinstance(layer, nn.Conv2d):
            net.conv_model[i] = RoundedConv(layer, "discriminator", chosen)
    return net


class Emulation:
    """The paper's score of the same images with one choice of roundings after the other."""

    def __init__(self, bundle: Bundle, images: ImageSet) -> None:
        self.bundle, self.images = bundle, images
        self._recon: dict[frozenset[str], Tensor] = {}

    @torch.inference_mode()
    def scores(self, chosen: Collection[str] = ()) -> Tensor:
        """Scores [n] with the chosen of ``ROUNDINGS`` and ``OTHERS``."""
        key = frozenset(name for name in chosen if not name.startswith("discriminator"))
        if key not in self._recon:
            net = rounded_generator(self.bundle.model, key)
            parts = self.images.batches(_BATCH)
            self._recon[key] = torch.cat([net(part, teacher=False)["recon"] for part in parts])
        net = rounded_discriminator(self.bundle.discriminator, chosen)
        return torch.cat([net.score(recon) for recon in self._recon[key].split(_BATCH)])

    def of_scorer(self, precision: str) -> Tensor:
        """Scores [n] of the scorer in that precision on this CPU."""
        pair = self.bundle.model, self.bundle.discriminator
        scorer = Scorer(*pair, self.bundle.calibration, PAPER_SCORE, precision, "cpu")
        return scorer.raw_scores(self.images, [PAPER_SCORE])[PAPER_SCORE]


def choices() -> dict[str, dict[str, list[str]]]:
    """What is rounded, in the order of ``ROUNDINGS`` and ``OTHERS``, by row and table."""
    every = [*ROUNDINGS, *OTHERS]
    tables = {
        "ways": WAYS,
        "alone": {name: {name} for name in ROUNDINGS},
        "without": {name: ROUNDINGS.keys() - {name} for name in ROUNDINGS},
    }
    return {
        table: {row: [name for name in every if name in chosen] for row, chosen in rows.items()}
        for table, rows in tables.items()
    }


def compared(exact: Tensor, found: Tensor, labels: Tensor) -> dict[str, float]:
    """Rank correlation with exact scores, noise, and AUROC."""
    noise = float((found - exact).std() / exact.std())
    auroc = image_auroc(labels.numpy(), SCORES[PAPER_SCORE][0] * found.numpy())
    return {
        "rank_correlation": rank_correlation(exact, found),
        "noise": round(noise, 5),
        "auroc": round(auroc, 4),
    }


def measure(emulation: Emulation, results: Results) -> None:
    """Fill in the rows that the results lack, and write them after each."""
    labels = emulation.images.labels
    exact = emulation.scores()
    figures = results.figures

    def fill(table: str, row: str, scores: Any, asked: Any) -> None:
        rows = figures.setdefault(table, {})
        if rows.get(row, {}).get("of") != asked:
            rows[row] = compared(exact, scores(asked), labels) | {"of": asked}
            results.write()
            print(table, row, rows[row], flush=True)

    fill("scorers", FLOAT32, emulation.of_scorer, "float32")
    if has_fast_bf16(torch.device("cpu")):
        fill("scorers", ON_CPU, emulation.of_scorer, "bf16")
    for table, rows in choices().items():
        for row, chosen in rows.items():
            fill(table, row, emulation.scores, chosen)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="Folder of a trained model.")
    add_data(parser)
    add_option(parser, "--images", 400, "Number of images of the splits val and test, at least")
    add_threads(parser)
    add_output(parser, RESULTS / "accuracy")


def main(options: Namespace) -> None:
    """Measure and write the results file."""
    torch.set_num_threads(options.threads)
    bundle = load_bundle(options.bundle)
    splits = held_out(find_records(options.data), bundle.model.image_size)
    images = ImageSet.concatenate(*splits.values()).subsample(options.images)
    settings = {"images": len(images), "about": bundle.about}
    results = Results(options.output / "rounding.json", torch.device("cpu"), settings)
    results.resume("device", "images", "about", "torch")
    measure(Emulation(bundle, images), results)
