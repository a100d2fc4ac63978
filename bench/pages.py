"""Puts measured figures into the pages of the repository: ``python -m bench pages``.

Each table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->`` and is made from a file
under ``bench/results/``; ``--check`` only says whether the README is up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from squid_fast.experiments.demo import HELD_OUT_GRIDS, SCORE
from squid_fast.inference.scores import PAPER_SCORE

from .accuracy import tables as accuracy_tables
from .operations.cases import cases
from .operations.roofline import Ceilings, work_of
from .scoring import costs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (
    ROOT / "README.md",
    RESULTS / "README.md",
    RESULTS / "scale.md",
    ROOT / "kernels" / "README.md",
)
# The vendor's data sheet of the H100 SXM: 3.35 TB/s, 989 TFLOP/s dense in bfloat16, and a third of
# 494 TFLOP/s in TF32 for float32.
H100 = Ceilings(bytes_per_s=3.35e12, bfloat16=989e12, float32=494e12 / 3)


def _not_measured(path: Path) -> str:
    return f"Not measured yet: there is no `bench/results/{path.name}`."


def speed(device: str) -> str:
    """The published way beside squid_fast."""
    path = RESULTS / f"speed_{device}.json"
    if not path.is_file():
        return _not_measured(path)
    figures = json.loads(path.read_text())
    lines = ["| | images/s | ratio |", "|---|--:|--:|"]
    told: dict[str, list[str]] = {}  # what was measured alike is told once
    for part, found in figures.items():
        told.setdefault(_measured(found, device), []).append(part)
        for name, row in found["rows"].items():
            lines.append(
                f"| {part}: {name} | {row['images_per_second']:.1f} | {row['ratio']:.1f} × |"
            )
    for how, parts in told.items():
        lines += ["", how if len(told) == 1 else f"{', '.join(parts).capitalize()}: {how}"]
    return "\n".join(lines)


def _measured(part: dict[str, Any], device: str) -> str:
    where = part["device"]
    if device == "cpu":
        where = f"{part['threads']} cores ({where})"
    return (
        f"{where}, {part['precision']}, torch {part['torch']}, "
        f"medians of {part['rounds']} interleaved rounds."
    )


def demo() -> str:
    """AUROC of every score for every kind of anomaly: mean and range over the demo's runs."""
    figures = json.loads((RESULTS / "demo.json").read_text())
    runs = figures["runs"]
    alone, beside = ([run for run in runs if bool(run["busy"]) is busy] for busy in (False, True))
    kinds = list(next(iter(runs[0]["aurocs"].values())))
    lines = ["| score | " + " | ".join(kinds) + " |", "|---|" + "--:|" * len(kinds)]
    for name in runs[0]["aurocs"]:
        label = f"`{name}`" + (" (the paper's)" if name == PAPER_SCORE else "")
        shown = {label: runs}
        if name == SCORE:
            shown = {f"{label}, alone": alone, f"{label}, beside a busy process": beside}
        for row, of in shown.items():
            cells = [_mean_and_range([run["aurocs"][name][kind] for run in of]) for kind in kinds]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    times = [
        f"{where} {_range([run['trained_grids'] for run in of], ',.0f')} grids and "
        f"{_range([run['seconds'] for run in of], '.0f')} s in all"
        for where, of in (("alone", alone), ("beside a busy process", beside))
    ]
    lines += [
        "",
        f"Mean and range over {len(runs)} runs, {len(alone)} alone and {len(beside)} beside a busy "
        f"process; {figures['minutes']:g} minutes until training ends: {', '.join(times)}. "
        f"{HELD_OUT_GRIDS} unseen normal grids against {HELD_OUT_GRIDS} of each kind. "
        f"{figures['threads']} cores ({figures['device']}, {figures['instructions']}).",
    ]
    return "\n".join(lines)


def _mean_and_range(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({_range(values, '.2f')})"


def _range(values: list[float], style: str) -> str:
    return f"{min(values):{style}}-{max(values):{style}}"


def threads() -> str:
    """Seconds of a training step beside busy processes, by how many threads there are."""
    figures = json.loads((RESULTS / "threads_cpu.json").read_text())
    rows = {(row["busy"], row["way"]): row for row in figures["rows"]}
    heads = {"before": "all, spinning", "limited": "all", "one": "one", "chosen": "chosen"}
    lines = [
        "| busy processes beside it | " + " | ".join(heads.values()) + " |",
        "|--:|" + "--:|" * len(heads),
    ]
    for busy in sorted({busy for busy, _ in rows}):
        cells = [f"{rows[busy, way]['mean']:.2f}" for way in heads]
        cells[-1] += f" ({rows[busy, 'chosen']['threads']})"
        lines.append(f"| {busy} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Seconds; preset `{figures['preset']}`, {figures['precision']}, {figures['threads']} "
        f"cores ({figures['device']}, {figures['instructions']}); means, the upper median of "
        f"{figures['rounds']} rounds. *Spinning*: as long as GNU's OpenMP does by itself. "
        "*Chosen*: the number in brackets.",
    ]
    return "\n".join(lines)


def trials() -> str:
    """What was tried for the small preset."""
    figures = json.loads((RESULTS / "demo_trials.json").read_text())
    score, paper = "patch_error", "discriminator_instance"
    kinds = list(next(iter(figures["trials"].values()))["auroc"][score])
    head = ["variant", "grids seen", *kinds, "paper's score"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for name, trial in figures["trials"].items():
        own = [f"{trial['auroc'][score][kind]:.2f}" for kind in kinds]
        published = (
            f"{min(trial['auroc'][paper].values()):.2f}-{max(trial['auroc'][paper].values()):.2f}"
        )
        lines.append(
            "| "
            + " | ".join([f"{name}: {trial['about']}", str(trial["grids"]), *own, published])
            + " |"
        )
    lines += ["", f"AUROC of `{score}`, {figures['seconds']:.0f} s of training each."]
    return "\n".join(lines)


def _microseconds(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def micro(device: str) -> str:
    """Every operation: microseconds of the eager reference, and how often faster the others are."""
    path = RESULTS / f"micro_{device}.json"
    if not path.is_file():
        return _not_measured(path)
    figures = json.loads(path.read_text())
    cuda = device == "cuda"
    head = ["operation", "sizes", "dtype", "eager, µs", "compiled", "squid_fast"]
    head += ["cold, µs", "of the floor"] if cuda else []
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "--:|" * (len(head) - 3)]
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in figures["rows"]:
        name = f"{row['operation']}, {row['direction'].replace('_', ' + ')}".replace("_", " ")
        sizes = ", ".join(f"{key} {value}" for key, value in row["sizes"].items())
        groups.setdefault((name, sizes, row["dtype"]), {})[row["contender"]] = row
    for group, rows in groups.items():
        cells = [_microseconds(rows["eager"]["median_us"]) if "eager" in rows else ""]
        for contender in ("compiled", "squid_fast"):
            ratio = rows.get(contender, {}).get("ratio_to_eager")
            cells.append(f"{ratio:.2f} ×" if ratio else "")
        ours = rows.get("squid_fast", {})
        if cuda:
            cells.append(_microseconds(ours["cold_us"]) if ours else "")
            fraction = ours.get("fraction_of_floor")
            cells.append(f"{fraction:.0%}" if fraction else "")
        lines.append("| " + " | ".join([*group, *cells]) + " |")
    count = len([x for x in figures["failures"].values() if not x.startswith("skipped")])
    lines += [
        "",
        f"{figures['device']}, torch {figures['torch']}, triton {figures['triton']}, commit "
        f"{figures['commit']}, {figures['date']}; "
        + ("" if cuda else f"{figures['threads']} threads; ")
        + f"medians, × is how often faster than the eager reference; {count} contenders failed.",
    ]
    return "\n".join(lines)


def floors() -> str:
    """The least time of every operation at the published sizes on an H100, and the measured."""
    shown = [
        case
        for case in cases(torch.device("cuda"))
        if case.dtype == "bfloat16" and dict(case.sizes)["B"] == 512
    ]
    path, measured = RESULTS / "micro_cuda.json", {}
    if path.is_file():
        for row in json.loads(path.read_text())["rows"]:
            if row["contender"] == "squid_fast":
                key = (row["operation"], row["direction"], row["dtype"], str(row["sizes"]))
                measured[key] = row["cold_us"]
    lines = [
        "| operation | sizes | MB | GFLOP | floor, µs | measured, µs |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for case in shown:
        name = f"{case.operation}, {case.direction.replace('_', ' + ')}".replace("_", " ")
        key = (case.operation, case.direction, case.dtype, str(dict(case.sizes)))
        time = f"{measured[key]:.1f}" if key in measured else "not yet"
        floor = H100.floor(work_of(case), case.dtype) * 1e6
        lines.append(
            f"| {name} | {case.label.replace('=', ' ')} | {work_of(case).bytes / 1e6:.1f} "
            f"| {work_of(case).flops / 1e9:.2f} | {floor:.1f} | {time} |"
        )
    lines += ["", "bfloat16; ceilings of the H100 SXM's data sheet."]
    return "\n".join(lines)


def machine_code() -> str:
    """What the compilers made of every kernel."""
    report = json.loads((RESULTS / "compile_report.json").read_text())
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["configurations"]:
        groups.setdefault(
            (row["kernel"].strip("_").removesuffix("_kernel"), row["arch"]), []
        ).append(row)
    lines = [
        "| kernel | card | configurations | registers | spilled bytes | shared KB | matrix units |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for (kernel, arch), rows in sorted(groups.items()):
        registers = [row["registers"] for row in rows]
        units = sorted({name for row in rows for name in row["matrix_instructions"]})
        lines.append(
            f"| {kernel.replace('_', ' ')} | {arch} | {len(rows)} "
            f"| {min(registers)}–{max(registers)} | {max(row['spilled_bytes'] for row in rows)} "
            f"| {max(row['shared_bytes'] for row in rows) / 1024:.0f} | {', '.join(units) or '–'} |"
        )
    lines += [
        "",
        f"Triton {report['triton']}; the largest of all configurations, of registers the range.",
    ]
    return "\n".join(lines)


def stages() -> str:
    """Milliseconds for an image by stage and precision."""
    figures = json.loads((RESULTS / "stages_cpu.json").read_text())
    found = figures["milliseconds"]
    names = list(found)
    lines = ["| stage | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    order = [name for name in found["published"] if name not in ("everything else", "total")]
    for stage in (*order, "everything else", "total"):
        cells = [f"{found[n][stage]:.2f}" if found[n].get(stage, 0) > 0 else "–" for n in names]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{figures['threads']} cores ({figures['device']}), batch of {figures['batch']}, medians "
        f"of {figures['rounds']} interleaved rounds. In bytes: {_in_bytes(figures)}. The "
        "discriminator is in *everything else*.",
    ]
    return "\n".join(lines)


def _in_bytes(figures: dict[str, Any]) -> str:
    words = {"downs": "encoder", "ups": "decoder"}
    parts = [name.split(".") for name in figures["stages_in_bytes"]]
    return ", ".join(f"{words[part]} {int(i) + 1}" for part, i in parts)


def ranking(full: bool) -> str:
    """Rank correlation and AUROC by precision, of all scores or of the paper's."""
    figures = json.loads((RESULTS / "stages_cpu.json").read_text())
    lines = ["| precision | score | rank correlation | noise | AUROC |", "|---|---|--:|--:|--:|"]
    for precision, scores in figures["ranking"].items():
        for name, row in scores.items():
            if full or (name == "discriminator_instance" and " " not in precision):
                lines.append(
                    f"| {precision} | `{name}` | {row['rank_correlation']:.4f} "
                    f"| {row['noise']:.3f} | {row['auroc']:.4f} |"
                )
    about = figures["about"]
    lines += [
        "",
        f"{figures['images']} test images of ZhangLab; the model was trained for {about['epochs']} "
        f"epochs on {about['training_images']} normal ones, too few for the paper's AUROC.",
    ]
    return "\n".join(lines)


def memory() -> str:
    """Peak memory of screening by the number of files."""
    figures = json.loads((RESULTS / "memory.json").read_text())
    lines = ["| files | the run, MB | each reader, MB | files/s |", "|--:|--:|--:|--:|"]
    for row in figures["runs"]:
        lines.append(
            f"| {row['files']:,} | {row['run_mb']:.0f} | {row['reader_mb']:.0f} "
            f"| {row['files'] / row['seconds']:.0f} |"
        )
    lines += ["", "Largest resident memory of `squid-fast screen`, with a tiny model."]
    return "\n".join(lines)


TABLES = {
    "stages": stages,
    "ranking": partial(ranking, True),
    "precision": partial(ranking, False),
    "memory": memory,
    "floors": floors,
    "machine_code": machine_code,
    "speed": partial(speed, "cpu"),
    "speed_cuda": partial(speed, "cuda"),
    "demo": demo,
    "threads": threads,
    "trials": trials,
    "micro_cpu": partial(micro, "cpu"),
    "micro_cuda": partial(micro, "cuda"),
    **{name: partial(costs.table, name) for name in costs.TABLES},
    **accuracy_tables.TABLES,
}


def fill(text: str) -> str:
    """The text with every marked table made anew."""
    pattern = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)


def main() -> None:
    """Rewrite the pages, or with ``--check`` exit with 1 if that would change one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = False
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        stale |= filled != text
        if not options.check:
            page.write_text(filled, encoding="utf-8")
    if options.check and stale:
        print("figures are out of date: run python -m bench pages", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
