"""Evaluation, screening and training of the zhanglab preset: the published way and squid_fast.

The contenders take turns, round by round, on the same images. Medians and ratios go to
``speed_cpu.json``, or ``speed_cuda.json`` on a GPU, which holds machine, settings and ``rows`` of
every part. Evaluation and screening are what ``squid-fast bench`` measures.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

import torch

from squid_fast import PRESETS, SQUID, Discriminator, reference
from squid_fast.experiments import benchmark
from squid_fast.experiments.benchmark import Benchmark, Contenders, compare, figures, random_bundle
from squid_fast.inference.bundle import load_bundle
from squid_fast.modules import discriminator_size
from squid_fast.training import Trainer, make_optimizers
from squid_fast.training.ema import EMA
from squid_fast.training.graphs import Losses, StepGraphs
from squid_fast.utils.devices import choose_device, choose_layout, choose_precision, to_layout

from ..arguments import add_device, add_folder, add_option, add_output, add_threads
from ..measurements import Results

PRESET = PRESETS["zhanglab"]
PARTS = (*benchmark.PARTS, "training")


def training(device: torch.device, count: int) -> Contenders:
    """Contenders that train on two batches, of which one trains the generator.

    The published loop runs the generator once for each loss, teacher and gradient graph included,
    in float32 and contiguous layout.
    """
    images = torch.rand(count, 1, PRESET.image_size, PRESET.image_size, device=device)
    recipe = PRESET.recipe
    size = discriminator_size(PRESET.image_size)
    plain = reference.SQUID(**PRESET.model).to(device)
    plain_discriminator = reference.Discriminator(size).to(device)
    optimizers = (
        torch.optim.Adam(plain.parameters(), 1e-4, (0.5, 0.999), weight_decay=1e-5),
        torch.optim.Adam(plain_discriminator.parameters(), 1e-4, (0.5, 0.999)),
    )

    def published() -> None:
        for index in range(2):
            optimizers[1].zero_grad()
            recon = plain(images)["recon"].detach()
            reference.discriminator_loss(
                plain_discriminator(images), plain_discriminator(recon)
            ).backward()
            optimizers[1].step()
            if index % recipe.n_critic == 0:
                optimizers[0].zero_grad()
                outputs = plain(images)
                reference.generator_loss(
                    images, outputs, plain_discriminator(outputs["recon"])
                ).backward()
                optimizers[0].step()
                for module in plain.modules():
                    if isinstance(module, reference.MemoryQueue):
                        module.update()
        _wait(device)

    layout = choose_layout(PRESET.model["features_root"])
    model = to_layout(SQUID(**PRESET.model).to(device), layout)
    discriminator = to_layout(Discriminator(size).to(device), layout)
    on_gpu = device.type == "cuda"
    pair = make_optimizers(model, discriminator, recipe, capturable=on_gpu)
    ema = EMA(discriminator, 0.998)
    trainer = Trainer(model, discriminator, pair, recipe, lambda loss: loss.backward(), ema)
    bf16 = choose_precision("auto", device) == "bf16"
    everything = torch.arange(count, device=device)

    def step(chosen: torch.Tensor, index: int) -> Losses:
        batch = images[chosen].to(memory_format=layout)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return trainer.step(batch, index)

    advance = StepGraphs(step, lambda index: index % recipe.n_critic) if on_gpu else step

    def ours() -> None:
        for index in range(2):
            advance(everything, index)
        _wait(device)

    return {"published loop": (2 * count, published), "squid_fast.Trainer": (2 * count, ours)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def add_arguments(parser: ArgumentParser) -> None:
    help = "Part to measure; the others stay in the file. Default: all."
    parser.add_argument("--part", choices=PARTS, help=help)
    add_option(parser, "--rounds", 9, "Number of rounds")
    add_option(parser, "--batch", 16, "Number of images in a batch")
    add_option(parser, "--seconds", 10.0, "Seconds that a screening run should last")
    add_folder(parser, "--bundle", "Trained model. Default: random weights.")
    add_folder(parser, "--data", "Images to screen. Default: made up.")
    add_device(parser)
    add_threads(parser)
    add_output(parser)


def main(options: Namespace) -> None:
    """Measure and write the results file."""
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    scoring = Benchmark(
        load_bundle(options.bundle) if options.bundle else random_bundle(PRESET),
        device,
        batch=options.batch,
        rounds=options.rounds,
        seconds=options.seconds,
        data=options.data,
    )
    parts = [options.part] if options.part else PARTS
    measured = scoring.run([part for part in parts if part in benchmark.PARTS])
    if "training" in parts:
        contenders = training(device, options.batch)
        measured["training"] = figures(contenders, compare(contenders, options.rounds))
    rows = {part: measured.pop(part) for part in parts}
    for part in parts:
        results = Results(options.output / f"speed_{device.type}.json", device, measured, part)
        results.figures["rows"] = rows[part]
        results.write()
    print(json.dumps(measured | rows, indent=2))
