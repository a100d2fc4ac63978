"""What each part of SQUID contributes, by training without it (the paper's ablations)."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import KINDS, DigitAnatomy, ImageSet
from ..inference import Scorer
from ..inference.bundle import load_bundle
from ..inference.calibration import check_calibration
from ..inference.scores import PAPER_SCORE, SCORES
from ..metrics import image_auroc
from ..presets import Preset, Recipe, current_names
from ..training import CheckpointError, Progress, train_bundle
from ..training.checkpoint import CHECKPOINT
from ..training.state import check_count
from ..utils.atomic import write_json
from ..utils.devices import Precision, choose_device
from ..utils.extras import require
from ..utils.machine import describe
from ..utils.outputs import check_folder
from ..utils.threads import check_threads

FULL = "full"
HARD_THRESHOLD = 0.0005  # far below most dot products, which then weight the slots themselves

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    FULL: ("SQUID as it is", {}),
    "one_memory": ("not space-aware: one memory for all patches, with as many slots",
                   {"inpainting": {"memory": "shared"}}),
    "no_inpainting": ("without the in-painting block: the decoder gets the features of the encoder",
                      {"inpainting": False}),
    "memory_matrix": ("learned slots in place of the queue", {"inpainting": {"memory": "matrix"}}),
    "hard_shrinkage": ("hard shrinkage in place of Gumbel shrinkage",
                       {"shrink_thres": HARD_THRESHOLD}),
    "no_shortcut": ("without masked shortcut: in-painted features everywhere", {"ratio": 1.0}),
    "soft_shortcut": ("a fixed blend in place of the masked shortcut",
                      {"inpainting": {"shortcut": "soft"}}),
    "no_teacher": ("without the teacher and its distillation", {"dist": False}),
    "convolution": ("a convolution over the patches in place of the transformer's attention",
                    {"inpainting": {"mixing": "convolution"}}),
}  # fmt: skip
"""Variants by name: a description, and the arguments of ``SQUID`` that differ."""


@dataclass(frozen=True)
class AblationData:
    """The images that all variants are trained and evaluated on.

    Attributes:
        validation: labelled images for thresholds and for the AUROCs in the logs of the runs.
        groups: by name, the indices of the test images that an AUROC is computed over.
    """

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
    groups: dict[str, Tensor]
    about: str


def digit_data(
    side: int, per_epoch: int, source: Path | None = None, seed: int = 0, held_out: int = 400
) -> AblationData:
    """DigitAnatomy in grids of ``side`` pixels, of which ``per_epoch`` normal ones are to train on.

    Args:
        source: folder of MNIST's IDX files; by default the digits bundled with scikit-learn.
        held_out: number of normal grids for validation, for the test, and of each kind of anomaly.
    """
    train, val, test = (
        DigitAnatomy(source, side // 3, split, seed) for split in ("train", "val", "test")
    )
    normal = test.normal(held_out, seed + 2)
    anomalous = test.anomalous(held_out * len(KINDS), seed + 3)
    kinds = np.array(list(normal.kinds) + list(anomalous.kinds))
    both = ImageSet.concatenate(normal.as_image_set(), anomalous.as_image_set())
    groups = {
        kind: torch.from_numpy(np.flatnonzero((kinds == kind) | (both.labels.numpy() == 0)))
        for kind in KINDS
    }
    drawn = train.normal(per_epoch, seed).as_image_set()
    validation = val.normal(held_out, seed + 1).as_image_set()
    return AblationData(drawn, validation, both, groups, f"DigitAnatomy, {per_epoch} grids")


def changed_model(base: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of ``SQUID`` for a variant of ``VARIANTS``.

    Raises:
        ValueError: the name is unknown.

    >>> from squid_fast import PRESETS
    >>> changed_model(PRESETS["small"].model, "no_teacher")["dist"]
    False
    """
    if name not in VARIANTS:
        raise ValueError(f"variant is {name!r}; known are {', '.join(VARIANTS)}.")
    changes = VARIANTS[name][1]
    if changes.get("ratio") == 1.0:  # decoder memories have a shortcut of their own
        memories = [entry and {**entry, "ratio": 1.0} for entry in base["decoder_memory"]]
        changes = changes | {"decoder_memory": memories}
    return {**base, **changes}


def run_ablation(
    data: AblationData,
    preset: Preset,
    out: Path,
    *,
    recipe: Recipe | None = None,
    variants: Collection[str] = tuple(VARIANTS),
    seeds: int = 1,
    device: str | None = None,
    precision: Precision = "auto",
    thread_count: int | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train every variant in the same way, with every seed, and evaluate it.

    ``out/ablation.json`` is written after each run. With ``resume``, finished runs found there are
    kept, and an interrupted one continues from its checkpoint.

    Returns:
        settings, machine and runs, a list with variant, seed, parameters, seconds and threads of
        the training, and AUROC by score and group; None if it was stopped.

    Raises:
        ValueError: a variant is unknown, or images or numbers do not fit; before any training.
        CheckpointError: ``out`` already holds an ablation, or one with other settings.
    """
    recipe = recipe or preset.recipe
    models = check_ablation(preset, out, variants, seeds, thread_count, resume)
    held_out = 0 if data.validation is None else int((data.validation.labels == 0).sum())
    check_calibration(len(data.train), held_out, 0.05)
    check_count(len(data.train), recipe.batch_size)
    for group, chosen in data.groups.items():
        if set(data.test.labels[chosen].tolist()) != {0, 1}:
            raise ValueError(
                f"the test images of {group} are not of both classes; normal and anomalous ones "
                "are needed to compare variants."
            )
    path = out / "ablation.json"
    settings = {
        "preset": preset.name, "data": data.about, "recipe": asdict(recipe), "precision": precision
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))  # as they are read again
    machine = describe(choose_device(device))
    results: dict[str, Any] = {"settings": settings, "machine": machine, "runs": []}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        results["settings"]["recipe"] = current_names(results["settings"]["recipe"])
        if results["settings"] != settings:
            raise CheckpointError(
                f"{path} is of other settings: {results['settings']}; choose another folder."
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(results, path)
    done = {(run["variant"], run["seed"]) for run in results["runs"]}
    for seed in range(seeds):
        for name in models:
            if (name, seed) in done:
                continue
            say(f"{name}, seed {seed}: {VARIANTS[name][0]}")
            folder = out / f"{name}-{seed}"
            trained = train_bundle(
                replace(preset, model=models[name]), data.train, folder,
                recipe=recipe, validation_set=data.validation, seed=seed, device=device,
                precision=precision, thread_count=thread_count,
                resume=(folder / CHECKPOINT).exists(), report=report, should_stop=should_stop,
            )  # fmt: skip
            if not trained.finished:
                return None
            row = {
                "variant": name, "seed": seed, "seconds": round(60 * trained.minutes, 1),
                "threads": trained.threads,
            }  # fmt: skip
            results["runs"].append(row | evaluate_bundle(folder, data, device))
            write_json(results, path)
    return results


def check_ablation(
    preset: Preset,
    out: Path,
    variants: Collection[str],
    seeds: int,
    thread_count: int | None,
    resume: bool,
) -> dict[str, dict[str, Any]]:
    """The arguments of ``SQUID`` for each variant; raises what ``run_ablation`` can before data."""
    models = {name: changed_model(preset.model, name) for name in variants}
    if not models or seeds < 1:
        raise ValueError(f"there are {len(models)} variants and {seeds} seeds; give 1 of each.")
    check_threads(thread_count)
    require("lightning_fabric", "train")
    require("sklearn.metrics", "train")
    check_folder(out)
    if (out / "ablation.json").exists() and not resume:
        raise CheckpointError(f"{out} already holds an ablation; add --resume to go on with it.")
    return models


def evaluate_bundle(bundle: Path, data: AblationData, device: str | None = None) -> dict[str, Any]:
    """Parameters of a trained bundle and its AUROCs by score and group."""
    labels = data.test.labels.numpy()
    auroc = {}
    for name, values in Scorer.load(bundle, device=device).raw_scores(data.test).items():
        z = SCORES[name][0] * values.double().numpy()
        auroc[name] = {
            group: round(image_auroc(labels[chosen], z[chosen]), 4)
            for group, chosen in data.groups.items()
        }
    model = load_bundle(bundle).model
    return {"parameters": sum(p.numel() for p in model.parameters()), "auroc": auroc}


def summarised(results: dict[str, Any], scores: Collection[str]) -> list[dict[str, Any]]:
    """One row for each variant, with the mean AUROC over groups and seeds.

    Keys: variant, about, parameters, seeds, and by score ``auroc``, ``spread`` (standard deviation
    over seeds; None with one seed) and ``difference`` (from the full SQUID; None without it).
    """
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        by_variant.setdefault(run["variant"], []).append(run)
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in by_variant.items():
        values = {s: [mean(run["auroc"][s].values()) for run in runs] for s in scores}
        rows[name] = {
            "variant": name, "about": VARIANTS[name][0], "parameters": runs[0]["parameters"],
            "seeds": len(runs), "auroc": {s: mean(values[s]) for s in scores},
            "spread": {s: stdev(values[s]) if len(runs) > 1 else None for s in scores},
        }  # fmt: skip
    full = rows[FULL]["auroc"] if FULL in rows else None
    for row in rows.values():
        row["difference"] = {s: None if full is None else row["auroc"][s] - full[s] for s in scores}
    return list(rows.values())


SHOWN = (PAPER_SCORE, "discriminator_image", "patch_error")


def as_markdown(results: dict[str, Any], scores: Collection[str] = SHOWN) -> str:
    """The rows of ``summarised`` as a table in Markdown."""
    lines = [
        "| variant | " + " | ".join(f"`{score}`" for score in scores) + " | parameters |",
        "|---|" + "--:|" * (len(scores) + 1),
    ]
    for row in summarised(results, scores):
        cells = " | ".join(cell(row, score) for score in scores)
        lines.append(f"| {row['variant']}: {row['about']} | {cells} | {row['parameters']:,} |")
    return "\n".join(lines)


def cell(row: dict[str, Any], score: str) -> str:
    """AUROC, its spread over seeds, and in brackets the difference from the full SQUID."""
    text, spread = f"{row['auroc'][score]:.3f}", row["spread"][score]
    text += "" if spread is None else f" ± {spread:.3f}"
    difference = row["difference"][score]
    return text if difference is None or row["variant"] == FULL else f"{text} ({difference:+.3f})"
