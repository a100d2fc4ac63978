"""The published way beside squid_fast, in one run: evaluation and training of the zhanglab preset.

``python -m bench.speed`` alternates the contenders round by round on the same images and writes
medians and ratios to ``bench/results/speed_cpu.json`` (``speed_cuda.json`` on a GPU). Times on
a shared CPU mean little by themselves; their ratios in one run do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squid_fast import PRESETS, SQUID, Discriminator, Scorer, reference
from squid_fast.devices import choose_device, choose_layout, choose_precision, to_layout
from squid_fast.training import Trainer, make_optimizers

RESULTS = Path(__file__).parent / "results"
PRESET = PRESETS["zhanglab"]
BATCH = 16


def evaluation(device: torch.device) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Contenders that score images: name to (images per call, call)."""
    torch.manual_seed(0)
    plain, judge = reference.SQUID(**PRESET.model), reference.Discriminator(4)
    plain.eval().to(device), judge.eval().to(device)
    model, discriminator = SQUID(**PRESET.model), Discriminator(4)
    model.load_state_dict(plain.state_dict())
    discriminator.load_state_dict(judge.state_dict())
    scorer = Scorer(model, discriminator, device=device)
    images = torch.rand(BATCH, 1, PRESET.image_size, PRESET.image_size)

    @torch.no_grad()
    def published(batch: Tensor) -> Tensor:
        return reference.discriminator_logits(judge, plain(batch.to(device))["recon"]).cpu()

    name = "discriminator_instance"
    return {
        "published way, batch of 1": (1, lambda: published(images[:1])),
        f"published way, batch of {BATCH}": (BATCH, lambda: published(images)),
        f"squid_fast.Scorer, batch of {BATCH}": (BATCH, lambda: scorer._look(images, [name])),
    }


def training(device: torch.device) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Contenders that train on two batches, of which one trains the generator."""
    images = torch.rand(BATCH, 1, PRESET.image_size, PRESET.image_size, device=device)
    recipe = PRESET.recipe
    plain, judge = reference.SQUID(**PRESET.model).to(device), reference.Discriminator(4).to(device)
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
    discriminator = to_layout(Discriminator(4).to(device), layout)
    pair = make_optimizers(model, discriminator, recipe)
    trainer = Trainer(model, discriminator, pair, recipe, lambda loss: loss.backward())
    bf16 = choose_precision("auto", device) == "bf16"
    laid_out = images.to(memory_format=layout)

    def ours() -> None:
        for index in range(2):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                trainer.step(laid_out, index)
        _wait(device)

    return {"published loop": (2 * BATCH, published), "squid_fast.Trainer": (2 * BATCH, ours)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(contenders: dict[str, tuple[int, Callable[[], Any]]], rounds: int) -> dict[str, Any]:
    """Median images per second of each, and its ratio to the first, round by round."""
    for _, call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (count, call) in contenders.items():
            started = time.perf_counter()
            call()
            seconds[name].append((time.perf_counter() - started) / count)
    first = seconds[next(iter(contenders))]
    return {
        name: {
            "images_per_second": round(1 / statistics.median(times), 2),
            "ratio": round(
                statistics.median([a / b for a, b in zip(first, times, strict=True)]), 2
            ),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    results = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": options.threads,
        "precision": choose_precision("auto", device),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "rounds": options.rounds,
        "evaluation": compare(evaluation(device), options.rounds),
        "training": compare(training(device), options.rounds),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"speed_{device.type}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
