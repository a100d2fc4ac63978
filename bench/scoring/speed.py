"""The published way beside squid_fast: evaluation, screening and training of the zhanglab preset.

``python -m bench speed`` alternates the contenders round by round on the same images and writes
medians and ratios to ``bench/results/speed_cpu.json`` (``speed_cuda.json`` on a GPU): of every part
machine, settings and ``rows``. Evaluation and screening are what ``squid-fast bench`` measures.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from squid_fast import PRESETS, SQUID, Discriminator, reference
from squid_fast.experiments import benchmark
from squid_fast.experiments.benchmark import Benchmark, Contenders, compare, figures, random_bundle
from squid_fast.inference.bundle import load_bundle
from squid_fast.modules import discriminator_size
from squid_fast.training import Trainer, make_optimizers
from squid_fast.training.ema import EMA
from squid_fast.training.graphs import Losses, StepGraphs
from squid_fast.utils.atomic import write_json
from squid_fast.utils.devices import choose_device, choose_layout, choose_precision, to_layout

from ..measurements import commit

RESULTS = Path(__file__).parents[1] / "results"
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
    judge = reference.Discriminator(size).to(device)
    optimizers = (
        torch.optim.Adam(plain.parameters(), 1e-4, (0.5, 0.999), weight_decay=1e-5),
        torch.optim.Adam(judge.parameters(), 1e-4, (0.5, 0.999)),
    )

    def published() -> None:
        for index in range(2):
            optimizers[1].zero_grad()
            recon = plain(images)["recon"].detach()
            reference.discriminator_loss(judge(images), judge(recon)).backward()
            optimizers[1].step()
            if index % recipe.n_critic == 0:
                optimizers[0].zero_grad()
                outputs = plain(images)
                reference.generator_loss(images, outputs, judge(outputs["recon"])).backward()
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


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a run over files")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device")
    parser.add_argument("--batch", type=int, default=16, help="as published")
    parser.add_argument("--bundle", type=Path, help="a trained model; else random weights")
    parser.add_argument("--data", type=Path, help="a folder of images; else they are made up")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=PARTS, help="only this; others stay in the file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"speed_{device.type}.json"
    parts = [options.part] if options.part else PARTS
    scoring = Benchmark(
        load_bundle(options.bundle) if options.bundle else random_bundle(PRESET),
        device,
        batch=options.batch,
        rounds=options.rounds,
        seconds=options.seconds,
        data=options.data,
    )
    results = scoring.run([part for part in parts if part in benchmark.PARTS])
    if "training" in parts:
        contenders = training(device, options.batch)
        results["training"] = figures(contenders, compare(contenders, options.rounds))
    rows = {part: results.pop(part) for part in parts}
    measured = {part: {"commit": commit(), **results, "rows": rows[part]} for part in parts}
    known = json.loads(path.read_text()) if path.is_file() else {}
    everything = known | measured
    write_json({part: everything[part] for part in PARTS if part in everything}, path)
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
