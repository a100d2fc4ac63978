"""Tables of the time and memory of scoring, screening and training."""

from __future__ import annotations

from functools import partial
from typing import Any

from .. import measurements
from ..markdown import of_file, table
from .costs import TABLES as COSTS
from .costs import Assumptions, read_rates
from .speed import PARTS
from .stages import STAGES


def speed(figures: dict[str, Any], cuda: bool = False) -> str:
    """The published way beside squid_fast."""
    parts = {part: figures[part] for part in PARTS if part in figures}
    rows = [
        (f"{part}: {name}", f"{row['images_per_second']:.1f}", f"{row['ratio']:.1f} ×")
        for part, found in parts.items()
        for name, row in found["rows"].items()
    ]
    told: dict[str, list[str]] = {}  # what was measured alike is told once
    for part, found in parts.items():
        where = found["device"]
        where = where if cuda else f"{found['threads']} cores ({where})"
        rounds = f"medians of {found['rounds']} interleaved rounds."
        how = f"{where}, {found['precision']}, torch {found['torch']}, {rounds}"
        told.setdefault(how, []).append(part)
    notes = [
        how if len(told) == 1 else f"{', '.join(parts).capitalize()}: {how}"
        for how, parts in told.items()
    ]
    return table(["", "images/s", "ratio"], rows, note="\n\n".join(notes))


def threads(figures: dict[str, Any]) -> str:
    """Seconds of a training step beside busy processes, by how many threads there are."""
    found = {(row["busy"], row["way"]): row for row in figures["rows"]}
    heads = {"before": "all, spinning", "limited": "all", "one": "one", "chosen": "chosen"}
    rows = []
    for busy in sorted({busy for busy, _ in found}):
        cells = [f"{found[busy, way]['mean']:.2f}" for way in heads]
        cells[-1] += f" ({found[busy, 'chosen']['threads']})"
        rows.append([str(busy), *cells])
    note = (
        f"Seconds; preset `{figures['preset']}`, {figures['precision']}, {figures['threads']} "
        f"cores ({figures['device']}, {figures['instructions']}); means, the upper median of "
        f"{figures['rounds']} rounds. *Spinning*: as long as GNU's OpenMP does by itself. "
        "*Chosen*: the number in brackets."
    )
    return table(["busy processes beside it", *heads.values()], rows, text=0, note=note)


def stages(figures: dict[str, Any]) -> str:
    """Milliseconds for an image by stage and precision."""
    found = figures["milliseconds"]
    last = ("everything else", "total")
    rows = []
    for stage in (*(name for name in found["published"] if name not in last), *last):
        times = [by_stage.get(stage, 0) for by_stage in found.values()]
        if any(time > 0 for time in times):
            rows.append([stage, *(f"{time:.2f}" if time > 0 else "–" for time in times)])
    parts = [name.split(".") for name in figures["stages_in_int8"]]
    in_int8 = [f"{STAGES[part]} {int(index) + 1}" for part, index in parts]
    note = (
        f"{figures['threads']} cores ({figures['device']}), batch of {figures['batch']}, medians "
        f"of {figures['rounds']} interleaved rounds. In int8: {', '.join(in_int8)}. "
        "The discriminator is in *everything else*."
    )
    return table(["stage", *found], rows, note=note)


def ranking(figures: dict[str, Any], full: bool = False) -> str:
    """Rank correlation and AUROC by precision, of all scores or of the paper's."""
    rows = []
    for precision, scores in figures["ranking"].items():
        for name, row in scores.items():
            if full or (name == "discriminator_instance" and " " not in precision):
                noise = f"{row['noise']:.3f}"
                cells = (f"{row['rank_correlation']:.4f}", noise, f"{row['auroc']:.4f}")
                rows.append((precision, f"`{name}`", *cells))
    about = figures["about"]
    note = (
        f"{figures['images']} test images of ZhangLab; the model was trained for {about['epochs']} "
        f"epochs on {about['training_images']} normal ones, too few for the paper's AUROC."
    )
    head = ["precision", "score", "rank correlation", "noise", "AUROC"]
    return table(head, rows, text=2, note=note)


def memory(figures: dict[str, Any]) -> str:
    """Peak memory of screening by the number of files."""
    rows = []
    for row in figures["runs"]:
        cells = (row["run_mb"], row["reader_mb"], row["files"] / row["seconds"])
        rows.append((f"{row['files']:,}", *(f"{x:.0f}" for x in cells)))
    note = "Largest resident memory of `squid-fast screen`, with a tiny model."
    return table(["files", "the run, MB", "each reader, MB", "files/s"], rows, text=0, note=note)


def cost(name: str) -> str:
    """What screening many images costs, with the assumptions as they stand."""
    return COSTS[name](read_rates(measurements.RESULTS), Assumptions())


TABLES = {
    "speed": of_file("speed_cpu.json", speed),
    "speed_cuda": of_file("speed_cuda.json", partial(speed, cuda=True)),
    "threads": of_file("threads_cpu.json", threads),
    "stages": of_file("stages_cpu.json", stages),
    "ranking": of_file("stages_cpu.json", partial(ranking, full=True)),
    "precision": of_file("stages_cpu.json", ranking),
    "memory": of_file("memory.json", memory),
    **{name: partial(cost, name) for name in COSTS},
}
