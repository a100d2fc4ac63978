"""Tables of what was reached on labelled images, from the files in ``results/accuracy``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from squid_fast.experiments.ablation import as_markdown
from squid_fast.experiments.baselines import METHODS
from squid_fast.experiments.demo import HELD_OUT_GRIDS, SCORE
from squid_fast.inference.scores import PAPER_SCORE
from squid_fast.presets import Recipe, current_names
from squid_fast.training import learning_rate

from .. import measurements
from ..markdown import of_file, table
from .data import SPLITS
from .rounding import PLAIN, ROUNDINGS


def _runs(pattern: str) -> dict[str, dict[str, Any]]:
    """The figures of runs by name."""
    paths = sorted((measurements.RESULTS / "accuracy").glob(pattern))
    return {path.stem: measurements.read(path) for path in paths}


def _labelled(score: str) -> str:
    return f"`{score}`" + (" (the paper's)" if score == PAPER_SCORE else "")


def _area(figures: dict[str, Any]) -> str:
    low, high = figures["auroc_interval"]
    return f"{figures['auroc']:.3f} ({low:.2f}-{high:.2f})"


def _on(machine: dict[str, Any]) -> str:
    threads = machine["threads"]
    return f"on {'one core' if threads == 1 else f'{threads} cores'} ({machine['device']})"


def _training_time(about: dict[str, Any]) -> str:
    """Minutes, and the machine's cores where the run names them."""
    where = f" {_on(about['machine'])}" if "machine" in about else ""
    return f"{about['training_minutes']:.0f} minutes{where}"


def accuracy() -> str:
    """All scores of the preset's runs on ZhangLab, one by one and together."""
    by_name = _runs("zhanglab_cpu-seed*.json")
    runs = list(by_name.values())
    several = measurements.read(measurements.RESULTS / "accuracy" / "together.json")
    if several and sorted(several["runs"]) != list(by_name):
        raise ValueError(
            f"together.json is of the runs {', '.join(several['runs'])}, but there are results of "
            f"{', '.join(by_name)}: give all of these to one call of python -m bench accuracy runs."
        )
    heads = [f"seed {run['about']['seed']}" for run in runs] + ["together"] * bool(several)
    rows = []
    for score in runs[0]["evaluation"]["test"]:
        mean = statistics.fmean(run["evaluation"]["val"][score]["auroc"] for run in runs)
        cells = [f"{mean:.3f}"] + [_area(run["evaluation"]["test"][score]) for run in runs]
        if several:
            both = several["evaluation"]["test"].get(score)
            cells.append(_area(both) if both else "")
        rows.append([_labelled(score), *cells])
    tests = [run["evaluation"]["test"] for run in [*runs, *([several] if several else [])]]
    paper = [test[PAPER_SCORE]["paper_best_test_accuracy"] for test in tests]
    about = runs[0]["about"]
    times = ", ".join(_training_time(run["about"]) for run in runs)
    together = "*Together* is the mean of the runs' z-scores. " if several else ""
    accuracies = ", ".join(f"{p['accuracy']:.3f} / {p['f1']:.3f}" for p in paper)
    note = (
        f"AUROC and its 95 % interval; {about['training_images']} normal training images, "
        f"{about['recipe']['epochs']} epochs, {times}. {together}Accuracy and F1 of the paper's "
        "score by the paper's protocol, at the threshold that is best on the test labels: "
        f"{accuracies}."
    )
    return table(["score", "val, mean", f"test: {heads[0]}", *heads[1:]], rows, note=note)


def runs() -> str:
    """The paper's score at every validation of every run, with and without the average."""
    rows = []
    for name, run in _runs("*-seed*.json").items():
        about, recipe = run["about"], Recipe(**current_names(run["about"]["recipe"]))
        rates = f"{recipe.lr:.1e} to {learning_rate(recipe, recipe.epochs - 1):.1e}"
        how = (f"`{name}`", f"{recipe.ema_decay}", rates, f"{about['training_minutes']:.0f}")
        test = f"{run['evaluation']['test'][PAPER_SCORE]['auroc']:.3f}"
        curves = (run["curves"][f"{x}/auroc_{PAPER_SCORE}"] for x in ("validation", "unaveraged"))
        areas = (" ".join(f"{area:.2f}" for _, area in curve) for curve in curves)
        rows.append([*how, f"epoch {about['epoch']}", test, *areas])
    head = ["run", "averaging", "rate", "minutes", "kept", "test", "averaged", "as it is"]
    return table(head, rows, text=(0, 6, 7))


def comparison(found: dict[str, Any]) -> str:
    """What SQUID is compared with."""
    rows = []
    for name, (_, meaning) in METHODS.items():
        if name in found:
            row = found[name]
            areas = [_area(row["evaluation"][split]) for split in ("val", "test")]
            minutes = row["about"]["training_minutes"]
            rows.append([f"`{name}`: {meaning}", *areas, f"{minutes:.1f}"])
    recipes = [row["about"]["recipe"] for row in found.values()]
    epochs = sorted({recipe["epochs"] for recipe in recipes if recipe})
    networks = f", networks trained for {' or '.join(map(str, epochs))} epochs" if epochs else ""
    note = f"ZhangLab, AUROC and its 95 % interval; one seed each{networks}."
    return table(["method", "val", "test", "minutes"], rows, note=note)


def ablation(found: dict[str, Any]) -> str:
    """What each part of SQUID contributes."""
    settings, runs, machine = found["settings"], found["runs"], found["machine"]
    seeds = len({run["seed"] for run in runs})
    minutes = sum(run["seconds"] for run in runs) / 60
    # Earlier runs have no number of threads of their own.
    threads = max(run.get("threads", machine["threads"]) for run in runs)
    machine |= {"threads": threads}
    return (
        f"{as_markdown(found)}\n\nPreset `{settings['preset']}` on {settings['data']}, "
        f"{settings['recipe']['epochs']} epochs, {seeds} seed{'s' * (seeds > 1)}, "
        f"{minutes:.0f} minutes in all {_on(machine)}; AUROC, mean over the kinds of "
        "anomaly, and in brackets the difference to the full SQUID."
    )


def contamination(found: dict[str, Any]) -> str:
    """AUROC over the share of abnormal training images."""
    scores = (PAPER_SCORE, "discriminator_image")
    rows = [
        [f"{float(rate):.0%}", *(_area(row["evaluation"][sp][s]) for s in scores for sp in SPLITS)]
        for rate, row in sorted(found["runs"].items(), key=lambda pair: float(pair[0]))
    ]
    settings = found["settings"]
    note = (
        f"Preset `{settings['preset']}`, {settings['epochs']} epochs only, one seed, "
        f"{settings['normal']} normal images."
    )
    head = [cell for score in scores for cell in (f"`{score}`: val", "test")]
    return table(["abnormal", *head], rows, text=0, note=note)


def ways(found: dict[str, Any]) -> str:
    """What ways of scoring on a GPU do to the ranking, by emulation."""
    rows = [
        [name, f"{row['rank_correlation']:.4f}", f"{row['noise']:.4f}", f"{row['auroc']:.4f}"]
        for name, row in (found["scorers"] | found["ways"]).items()
    ]
    about = found["about"]
    note = (
        f"`{PAPER_SCORE}` of {found['images']} images of ZhangLab's `val` and `test`; preset "
        f"`{about['preset']}` after epoch {about['epoch']}, on {about['training_images']} normal "
        "images."
    )
    return table(["way", "rank correlation", "noise", "AUROC"], rows, note=note)


def roundings(found: dict[str, Any]) -> str:
    """What each rounding costs, by itself and beside all others."""
    rows = []
    for name, meaning in ROUNDINGS.items():
        kinds = (found["alone"][name], found["without"][name])
        cells = [(f"{row['noise']:.4f}", f"{row['rank_correlation']:.4f}") for row in kinds]
        rows.append([f"`{name}`: {meaning}", *cells[0], *cells[1]])
    every = found["ways"][PLAIN]
    rows.append(["all", f"{every['noise']:.4f}", f"{every['rank_correlation']:.4f}", "", ""])
    head = ["rounding", "alone: noise", "rank correlation", "all but it: noise", "rank correlation"]
    return table(head, rows)


def demo(figures: dict[str, Any]) -> str:
    """AUROC of every score for every kind of anomaly: mean and range over the demo's runs."""
    runs = figures["runs"]
    alone, beside = ([run for run in runs if bool(run["busy"]) is busy] for busy in (False, True))
    kinds = list(next(iter(runs[0]["aurocs"].values())))
    rows = []
    for name in runs[0]["aurocs"]:
        label = _labelled(name)
        shown = {label: runs}
        if name == SCORE:
            shown = {f"{label}, alone": alone, f"{label}, beside a busy process": beside}
        for row, of in shown.items():
            values = ([run["aurocs"][name][kind] for run in of] for kind in kinds)
            rows.append([row, *map(_mean_and_range, values)])
    times = [
        f"{where} {_range([run['trained_grids'] for run in of], ',.0f')} grids and "
        f"{_range([run['seconds'] for run in of], '.0f')} s in all"
        for where, of in (("alone", alone), ("beside a busy process", beside))
    ]
    note = (
        f"Mean and range over {len(runs)} runs, {len(alone)} alone and {len(beside)} beside a busy "
        f"process; {figures['minutes']:g} minutes until training ends: {', '.join(times)}. "
        f"{HELD_OUT_GRIDS} unseen normal grids against {HELD_OUT_GRIDS} of each kind. "
        f"{figures['threads']} cores ({figures['device']}, {figures['instructions']})."
    )
    return table(["score", *kinds], rows, note=note)


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ({_range(values, '.2f')})"


def _range(values: Sequence[float], style: str) -> str:
    return f"{min(values):{style}}-{max(values):{style}}"


def trials(figures: dict[str, Any]) -> str:
    """What was tried for the small preset."""
    score = "patch_error"
    rows = []
    for name, trial in figures["trials"].items():
        own = [f"{area:.2f}" for area in trial["auroc"][score].values()]
        paper = _range(list(trial["auroc"][PAPER_SCORE].values()), ".2f")
        rows.append([f"{name}: {trial['about']}", str(trial["grids"]), *own, paper])
    kinds = next(iter(figures["trials"].values()))["auroc"][score]
    note = f"AUROC of `{score}`, {figures['seconds']:.0f} s of training each."
    return table(["variant", "grids seen", *kinds, "paper's score"], rows, note=note)


TABLES = {
    "accuracy": of_file("accuracy/zhanglab_cpu-seed0.json", lambda _: accuracy()),
    "runs": of_file("accuracy/zhanglab_cpu-seed0.json", lambda _: runs()),
    "comparison": of_file("accuracy/comparison.json", comparison),
    "ablation": of_file("accuracy/ablation.json", ablation),
    "contamination": of_file("accuracy/contamination.json", contamination),
    "ways": of_file("accuracy/rounding.json", ways),
    "roundings": of_file("accuracy/rounding.json", roundings),
    "demo": of_file("demo.json", demo),
    "trials": of_file("demo_trials.json", trials),
}
