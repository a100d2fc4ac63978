"""Evaluation, screening and training of a preset: the published way and squid_fast.

The contenders take turns, round by round, on the same images. Medians and ratios go to
``speed_cpu.json``, or ``speed_cuda.json`` on a GPU, which holds machine, settings and ``rows`` of
every part. Evaluation and screening are what ``squid-fast bench`` measures.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from squid_fast import PRESETS, SQUID, Discriminator, reference
from squid_fast.experiments import benchmark
from squid_fast.experiments.benchmark import Benchmark, Contenders, compare, figures, random_bundle
from squid_fast.inference.bundle import load_bundle
from squid_fast.modules import discriminator_size
from squid_fast.presets import Preset
from squid_fast.training import Trainer, make_optimizers
from squid_fast.training.ema import EMA
from squid_fast.training.graphs import Losses, StepGraphs
from squid_fast.training.half_weights import HalfWeights
from squid_fast.utils.devices import (
    Backend,
    choose_device,
    choose_layout,
    choose_precision,
    to_layout,
)
from squid_fast.utils.tf32 import tf32

from ..arguments import add_device, add_folder, add_option, add_output, add_threads
from ..measurements import Results

Step = Callable[[int], object]  # takes the number of the batch
PARTS = (*benchmark.PARTS, "training")


def training(preset: Preset, device: torch.device, count: int) -> Contenders:
    """Contenders that train on two batches, of which one trains the generator."""
    images = torch.rand(count, 1, preset.image_size, preset.image_size, device=device)
    steps = {
        "published loop": _published_step(preset, images),
        "squid_fast.Trainer": _our_step(preset, images),
    }

    def both(step: Step) -> None:
        with tf32(False):
            for index in range(2):
                step(index)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return {name: (2 * count, partial(both, step)) for name, step in steps.items()}


def _published_step(preset: Preset, images: Tensor) -> Step:
    """Runs the generator once for each loss, teacher and gradient graph included, in float32."""
    model = reference.SQUID(**preset.model).to(images.device)
    discriminator = reference.Discriminator(discriminator_size(preset.image_size))
    discriminator.to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, (0.5, 0.999), weight_decay=1e-5)
    other = torch.optim.Adam(discriminator.parameters(), 1e-4, (0.5, 0.999))

    def step(index: int) -> None:
        other.zero_grad()
        recon = model(images)["recon"].detach()
        reference.discriminator_loss(discriminator(images), discriminator(recon)).backward()
        other.step()
        if index % preset.recipe.n_critic == 0:
            optimizer.zero_grad()
            outputs = model(images)
            logits = discriminator(outputs["recon"])
            reference.generator_loss(images, outputs, logits).backward()
            optimizer.step()
            for module in model.modules():
                if isinstance(module, reference.MemoryQueue):
                    module.update()

    return step


def _our_step(preset: Preset, images: Tensor) -> Step:
    device, recipe = images.device, preset.recipe
    layout = choose_layout(preset.model["features_root"])
    model = to_layout(SQUID(**preset.model).to(device), layout)
    size = discriminator_size(preset.image_size)
    discriminator = to_layout(Discriminator(size).to(device), layout)
    on_gpu = device.type == "cuda"
    pair = make_optimizers(model, discriminator, recipe, capturable=on_gpu)
    ema = EMA(discriminator, 0.998)
    bf16 = choose_precision("auto", device) == "bf16"
    called = [HalfWeights(module) if bf16 else module for module in (model, discriminator)]
    trainer = Trainer(*called, pair, recipe, lambda loss: loss.backward(), ema)

    def step(chosen: Tensor, index: int) -> Losses:
        batch = images[chosen].to(memory_format=layout)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return trainer.step(batch, index)

    advance = StepGraphs(step, lambda index: index % recipe.n_critic) if on_gpu else step
    return partial(advance, torch.arange(len(images), device=device))


def add_arguments(parser: ArgumentParser) -> None:
    help = "Part to measure; the others stay in the file. Default: all."
    parser.add_argument("--part", choices=PARTS, help=help)
    add_option(parser, "--preset", "zhanglab", "Preset of the model", choices=PRESETS)
    add_option(parser, "--rounds", 9, "Number of rounds")
    add_option(parser, "--batch", 16, "Number of images in a batch")
    add_option(parser, "--seconds", 10.0, "Seconds that a screening run should last")
    help = "Backend of the scorer; compile is timed beside eager"
    add_option(parser, "--backend", "eager", help, choices=get_args(Backend))
    add_folder(parser, "--bundle", "Trained model. Default: random weights.")
    add_folder(parser, "--data", "Images to screen. Default: made up.")
    add_device(parser)
    add_threads(parser)
    add_output(parser)


def main(options: Namespace) -> None:
    """Measure and write the results file."""
    torch.set_num_threads(options.threads)
    device, preset = choose_device(options.device), PRESETS[options.preset]
    bundle = load_bundle(options.bundle) if options.bundle else random_bundle(preset)
    asked = ("batch", "rounds", "seconds", "data", "backend")
    how = {name: getattr(options, name) for name in asked}
    parts = [options.part] if options.part else PARTS
    rows = Benchmark(bundle, device, **how).run([part for part in parts if part != "training"])
    if "training" in parts:
        contenders = training(preset, device, options.batch)
        rows["training"] = figures(contenders, compare(contenders, options.rounds))
    settings = {name: value for name, value in rows.items() if name not in PARTS}
    path = options.output / f"speed_{device.type}.json"
    for part in parts:
        results = Results(path, device, {"preset": preset.name} | settings, part)
        results.figures["rows"] = rows[part]
        results.write()
    print(json.dumps(rows, indent=2))
