"""AUROC over the share of abnormal images among those that training takes for normal.

``python -m bench accuracy contamination --data DIR --contaminants DIR`` trains SQUID at every rate
and writes ``contamination.json`` and its curve ``contamination.svg`` under ``bench/results/accuracy``. Rates that
are in the file with the same settings are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from squid_fast import PRESETS, Scorer
from squid_fast.data import ImageSet, find_records, load_images, select
from squid_fast.data.contamination import check_apart, contaminated
from squid_fast.inference.scores import PAPER_SCORE
from squid_fast.presets import Preset
from squid_fast.training import load_splits, train_bundle
from squid_fast.utils.atomic import write_json

from ..measurements import describe

RESULTS = Path(__file__).parents[1] / "results" / "accuracy" / "contamination.json"
SCORES = (PAPER_SCORE, "discriminator_image")


def run(
    preset: Preset, train_set: ImageSet, held_out: dict[str, ImageSet], seed: int
) -> dict[str, Any]:
    """Train on these images and evaluate on the splits by name."""
    with tempfile.TemporaryDirectory() as folder:
        trained = train_bundle(
            preset, train_set, Path(folder), validation_set=held_out["val"], seed=seed
        )
        scorer = Scorer.load(folder)
    found = {split: scorer.evaluate(images)[0] for split, images in held_out.items()}
    return {
        "minutes": round(trained.minutes, 2),
        "evaluation": {
            split: {name: figures[name].to_json() for name in SCORES}
            for split, figures in found.items()
        },
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """AUROC on test images over the rate, with its 95 % interval."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for colour, score in enumerate(SCORES):
        rates = sorted(results["runs"], key=float)
        found = [results["runs"][rate]["evaluation"]["test"][score] for rate in rates]
        areas = [figures["auroc"] for figures in found]
        below = [a - f["auroc_interval"][0] for a, f in zip(areas, found, strict=True)]
        above = [f["auroc_interval"][1] - a for a, f in zip(areas, found, strict=True)]
        axes.errorbar(
            [100 * float(rate) for rate in rates], areas, yerr=[below, above],
            color=f"C{colour}", marker="o", capsize=3, label=score,
        )  # fmt: skip
    axes.set(xlabel="abnormal among the training images, %", ylabel="AUROC on test images")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run the rates and merge their figures into the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--contaminants", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.1, 0.2])
    parser.add_argument("--preset", default="zhanglab_cpu", choices=list(PRESETS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base, epochs = PRESETS[options.preset], options.epochs
    recipe = dataclasses.replace(base.recipe, epochs=epochs, validate_every=epochs)
    preset = dataclasses.replace(base, recipe=recipe)
    records, others = find_records(options.data), find_records(options.contaminants)
    held_out_records = {split: select(records, split) for split in ("val", "test")}
    check_apart([r.path for r in others], [r.path for s in held_out_records.values() for r in s])
    normal, _ = load_splits(records, base.image_size)
    odd = load_images(others, base.image_size)
    held_out = {s: load_images(found, base.image_size) for s, found in held_out_records.items()}
    settings = {"preset": base.name, "epochs": epochs, "seed": options.seed, "normal": len(normal)}
    results: dict[str, Any] = {"settings": settings, "runs": {}}
    if options.output.exists():
        known = json.loads(options.output.read_text())
        results = known if known["settings"] == settings else results
    for rate in (rate for rate in options.rates if f"{rate:g}" not in results["runs"]):
        mixed = contaminated(normal, odd, rate, options.seed)[0] if rate else normal
        results["runs"][f"{rate:g}"] = run(preset, mixed, held_out, options.seed)
        results |= describe(torch.device("cpu"))
        write_json(results, options.output)
        found = results["runs"][f"{rate:g}"]["evaluation"]["test"]
        print(rate, {name: round(found[name]["auroc"], 4) for name in SCORES}, flush=True)
    draw(results, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
