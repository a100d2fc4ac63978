"""Tables of what was reached on labelled images, from the files in ``results/accuracy``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from squid_fast.experiments.ablation import as_markdown
from squid_fast.experiments.baselines import METHODS
from squid_fast.inference.scores import PAPER_SCORE
from squid_fast.presets import Recipe, current_names
from squid_fast.training import learning_rate

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else None


def _missing(name: str) -> str:
    return f"Not measured yet: there is no `bench/results/accuracy/{name}`."


def _area(figures: dict[str, Any]) -> str:
    low, high = figures["auroc_interval"]
    return f"{figures['auroc']:.3f} ({low:.2f}-{high:.2f})"


def _on(machine: dict[str, Any]) -> str:
    threads = machine["threads"]
    return f"on {'one core' if threads == 1 else f'{threads} cores'} ({machine['device']})"


def _training_time(about: dict[str, Any]) -> str:
    """Minutes, and the machine's cores where the run has kept them."""
    where = f" {_on(about['machine'])}" if "machine" in about else ""
    return f"{about['training_minutes']:.0f} minutes{where}"


def accuracy() -> str:
    """All scores of the preset's runs on ZhangLab, one by one and together."""
    paths = sorted(RESULTS.glob("zhanglab_cpu-seed*.json"))
    runs = [json.loads(path.read_text()) for path in paths]
    if not runs:
        return _missing("zhanglab_cpu-seed0.json")
    several = _read("together.json")
    if several and sorted(several["runs"]) != [path.stem for path in paths]:
        raise ValueError(
            f"together.json is of the runs {', '.join(several['runs'])}, but there are results of "
            f"{', '.join(path.stem for path in paths)}: run bench accuracy on all of these at once."
        )
    heads = [f"seed {run['about']['seed']}" for run in runs] + ["together"] * bool(several)
    lines = [
        f"| score | val, mean | test: {' | '.join(heads)} |",
        "|---|--:|" + "--:|" * len(heads),
    ]
    for score in runs[0]["evaluation"]["test"]:
        label = f"`{score}`" + (" (the paper's)" if score == PAPER_SCORE else "")
        mean = sum(run["evaluation"]["val"][score]["auroc"] for run in runs) / len(runs)
        cells = [f"{mean:.3f}"] + [_area(run["evaluation"]["test"][score]) for run in runs]
        if several:
            both = several["evaluation"]["test"].get(score)
            cells.append(_area(both) if both else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    tests = [run["evaluation"]["test"] for run in [*runs, *([several] if several else [])]]
    paper = [test[PAPER_SCORE]["paper_best_test_accuracy"] for test in tests]
    about = runs[0]["about"]
    times = ", ".join(_training_time(run["about"]) for run in runs)
    together = "*Together* is the mean of the runs' z-scores. " if several else ""
    accuracies = ", ".join(f"{p['accuracy']:.3f} / {p['f1']:.3f}" for p in paper)
    lines += [
        "",
        f"AUROC and its 95 % interval; {about['training_images']} normal training images, "
        f"{about['recipe']['epochs']} epochs, {times}. {together}Accuracy and F1 of the paper's "
        "score by the paper's protocol, at the threshold that is best on the test labels: "
        f"{accuracies}.",
    ]
    return "\n".join(lines)


def runs() -> str:
    """The paper's score at every validation of every run, with and without the average."""
    lines = ["| run | averaging | rate | minutes | kept | test | averaged | as it is |"]
    lines.append("|---|--:|--:|--:|--:|--:|---|---|")
    for path in sorted(RESULTS.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        about, recipe = run["about"], Recipe(**current_names(run["about"]["recipe"]))
        last = learning_rate(recipe, recipe.epochs - 1)
        cells = [
            f"`{path.stem}`",
            f"{recipe.ema_decay}",
            f"{recipe.lr:.1e} to {last:.1e}",
            f"{about['training_minutes']:.0f}",
            f"epoch {about['epoch']}",
            f"{run['evaluation']['test'][PAPER_SCORE]['auroc']:.3f}",
        ]
        cells += [
            " ".join(f"{area:.2f}" for _, area in run["curves"][f"{name}/auroc_{PAPER_SCORE}"])
            for name in ("validation", "unaveraged")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else _missing("zhanglab_cpu-seed0.json")


def comparison() -> str:
    """What SQUID is compared with."""
    found = _read("comparison.json")
    if found is None:
        return _missing("comparison.json")
    lines = ["| method | val | test | minutes |", "|---|--:|--:|--:|"]
    for name, (_, meaning) in METHODS.items():
        if name in found:
            row = found[name]
            areas = [_area(row["evaluation"][split]) for split in ("val", "test")]
            minutes = row["about"]["training_minutes"]
            lines.append(f"| `{name}`: {meaning} | {' | '.join(areas)} | {minutes:.1f} |")
    recipes = [row["about"]["recipe"] for row in found.values()]
    epochs = sorted({recipe["epochs"] for recipe in recipes if recipe})
    networks = f", networks trained for {' or '.join(map(str, epochs))} epochs" if epochs else ""
    lines += ["", f"ZhangLab, AUROC and its 95 % interval; one seed each{networks}."]
    return "\n".join(lines)


def ablation() -> str:
    """What each part of SQUID contributes."""
    found = _read("ablation.json")
    if found is None:
        return _missing("ablation.json")
    settings = found["settings"]
    seeds = len({run["seed"] for run in found["runs"]})
    minutes = sum(run["seconds"] for run in found["runs"]) / 60
    default = found["machine"]["threads"]  # of runs from before each kept its own number
    threads = max(run.get("threads", default) for run in found["runs"])
    machine = found["machine"] | {"threads": threads}
    return (
        f"{as_markdown(found)}\n\nPreset `{settings['preset']}` on {settings['data']}, "
        f"{settings['recipe']['epochs']} epochs, {seeds} seed{'s' * (seeds > 1)}, "
        f"{minutes:.0f} minutes in all {_on(machine)}; AUROC, mean over the kinds of "
        "anomaly, and in brackets the difference to the full SQUID."
    )


def contamination() -> str:
    """AUROC over the share of abnormal training images."""
    found = _read("contamination.json")
    if found is None:
        return _missing("contamination.json")
    scores = (PAPER_SCORE, "discriminator_image")
    lines = ["| abnormal | " + " | ".join(f"`{s}`: val | test" for s in scores) + " |"]
    lines.append("|--:|" + "--:|--:|" * len(scores))
    for rate, row in sorted(found["runs"].items(), key=lambda pair: float(pair[0])):
        cells = [_area(row["evaluation"][sp][s]) for s in scores for sp in ("val", "test")]
        lines.append(f"| {float(rate):.0%} | " + " | ".join(cells) + " |")
    settings = found["settings"]
    lines += [
        "",
        f"Preset `{settings['preset']}`, {settings['epochs']} epochs only, one seed, "
        f"{settings['normal']} normal images.",
    ]
    return "\n".join(lines)


TABLES = {
    "accuracy": accuracy,
    "runs": runs,
    "comparison": comparison,
    "ablation": ablation,
    "contamination": contamination,
}
