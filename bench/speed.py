"""The published way beside squid_fast: evaluation, screening and training of the zhanglab preset.

``python -m bench.speed`` alternates the contenders round by round on the same images and writes
medians and ratios to ``bench/results/speed_cpu.json`` (``speed_cuda.json`` on a GPU). Evaluation
includes the way of the images to the device and of the scores back. Times on a shared CPU mean
little by themselves; their ratios in one run do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from squid_fast import PRESETS, SQUID, Discriminator, Scorer, calibrate, reference, screen
from squid_fast.data import ImageSet, load_image
from squid_fast.devices import choose_device, choose_layout, choose_precision, to_layout
from squid_fast.training import Trainer, make_optimizers

from .machine import describe

RESULTS = Path(__file__).parent / "results"
PRESET = PRESETS["zhanglab"]
BATCH = 16  # published
LARGE_BATCH = 256  # which a GPU needs to be busy


Contenders = dict[str, tuple[int, Callable[[], Any]]]  # name to (images per call, call)
PARTS = ("evaluation", "screening", "training")


def _published_and_ours(
    device: torch.device,
) -> tuple[Callable[[Tensor], Tensor], SQUID, Discriminator]:
    """The published way to score a batch, and our model and discriminator of the same weights."""
    torch.manual_seed(0)
    plain, judge = reference.SQUID(**PRESET.model), reference.Discriminator(4)
    plain.eval().to(device), judge.eval().to(device)
    model, discriminator = SQUID(**PRESET.model), Discriminator(4)
    model.load_state_dict(plain.state_dict())
    discriminator.load_state_dict(judge.state_dict())

    @torch.no_grad()
    def published(batch: Tensor) -> Tensor:
        return reference.discriminator_logits(judge, plain(batch.to(device))["recon"]).cpu()

    return published, model, discriminator


def evaluation(device: torch.device, batches: list[int]) -> Contenders:
    """Contenders that score images in memory."""
    published, model, discriminator = _published_and_ours(device)
    scorer = Scorer(model, discriminator, device=device)
    images = torch.rand(max(batches), 1, PRESET.image_size, PRESET.image_size)

    name = "discriminator_instance"

    def ours(batch: Tensor) -> Any:
        return scorer._look(batch, [name])

    contenders: Contenders = {"published way, batch of 1": (1, lambda: published(images[:1]))}
    for count in batches:
        batch = images[:count]
        contenders |= {
            f"published way, batch of {count}": (count, partial(published, batch)),
            f"squid_fast.Scorer, batch of {count}": (count, partial(ours, batch)),
        }
    return contenders


def screening(device: torch.device, count: int, folder: Path) -> Contenders:
    """Contenders that score PNG files of 512 x 512, which are written to the folder first."""
    from PIL import Image

    published, model, discriminator = _published_and_ours(device)
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (32, 32), dtype=np.uint8))
        coarse.resize((512, 512), Image.Resampling.BICUBIC).save(folder / f"{index:04}.png")
    files = sorted(folder.iterdir())
    size = PRESET.image_size
    images = torch.randint(256, (20, 1, size, size), dtype=torch.uint8)
    normal = ImageSet(images, torch.zeros(20, dtype=torch.int64), ["normal"] * 20)
    calibration = calibrate(model, discriminator, normal, device=device)
    scorer = Scorer(model, discriminator, calibration, device=device)
    few = files[:BATCH]

    def one_by_one() -> None:
        for path in few:
            published(torch.from_numpy(load_image(path, size))[None, None])

    def ours() -> None:
        for row in screen(scorer, files):
            if row.error:
                raise RuntimeError(f"{row.path}: {row.error}")

    return {
        "published way, file by file": (len(few), one_by_one),
        f"squid_fast.screen, {count} files": (count, ours),
    }


def training(device: torch.device, count: int) -> Contenders:
    """Contenders that train on two batches, of which one trains the generator."""
    images = torch.rand(count, 1, PRESET.image_size, PRESET.image_size, device=device)
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

    return {"published loop": (2 * count, published), "squid_fast.Trainer": (2 * count, ours)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(contenders: Contenders, rounds: int) -> dict[str, Any]:
    """Medians of images per second and of a call; the ratio to the first, round by round."""
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
            "milliseconds": round(1e3 * contenders[name][0] * statistics.median(times), 3),
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
    parser.add_argument("--batch", type=int, nargs="+", help="the first is trained with, too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=PARTS, help="only this; others stay in the file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    batches = options.batch or ([BATCH, LARGE_BATCH] if device.type == "cuda" else [BATCH])
    results: dict[str, Any] = describe(device) | {
        "precision": choose_precision("auto", device),
        "rounds": options.rounds,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"speed_{device.type}.json"
    if options.part and path.is_file():
        found = json.loads(path.read_text())
        results |= {part: found[part] for part in PARTS if part in found}
    with tempfile.TemporaryDirectory() as folder:
        prepare = {
            "evaluation": lambda: evaluation(device, batches),
            "screening": lambda: screening(device, max(batches), Path(folder)),
            "training": lambda: training(device, batches[0]),
        }
        for part in [options.part] if options.part else PARTS:
            results[part] = compare(prepare[part](), options.rounds)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
