"""Tables of the time and memory of scoring, screening and training."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from .. import measurements
from ..markdown import not_measured, table
from .costs import TABLES as COSTS
from .costs import Assumptions, read_rates
from .speed import PARTS


def _read(name: str) -> dict[str, Any]:
    return measurements.read(measurements.RESULTS / name)


def speed(device: str) -> str:
    """The published way beside squid_fast."""
    name = f"speed_{device}.json"
    figures = _read(name)
    if not figures:
        return not_measured(name)
    parts = {part: figures[part] for part in PARTS if part in figures}
    rows = [
        (f"{part}: {name}", f"{row['images_per_second']:.1f}", f"{row['ratio']:.1f} ×")
        for part, found in parts.items()
        for name, row in found["rows"].items()
    ]
    told: dict[str, list[str]] = {}  # what was measured alike is told once
    for part, found in parts.items():
        told.setdefault(_measured(found, device), []).append(part)
    notes = [
        how if len(told) == 1 else f"{', '.join(parts).capitalize()}: {how}"
        for how, parts in told.items()
    ]
    return table(["", "images/s", "ratio"], rows, note="\n\n".join(notes))


def _measured(part: dict[str, Any], device: str) -> str:
    where = part["device"]
    if device == "cpu":
        where = f"{part['threads']} cores ({where})"
    return (
        f"{where}, {part['precision']}, torch {part['torch']}, "
        f"medians of {part['rounds']} interleaved rounds."
    )


def threads() -> str:
    """Seconds of a training step beside busy processes, by how many threads there are."""
    figures = _read("threads_cpu.json")
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


def stages() -> str:
    """Milliseconds for an image by stage and precision."""
    figures = _read("stages_cpu.json")
    found = figures["milliseconds"]
    last = ("everything else", "total")
    rows = []
    for stage in (*(name for name in found["published"] if name not in last), *last):
        times = [by_stage.get(stage, 0) for by_stage in found.values()]
        if any(time > 0 for time in times):
            rows.append([stage, *(f"{time:.2f}" if time > 0 else "–" for time in times)])
    note = (
        f"{figures['threads']} cores ({figures['device']}), batch of {figures['batch']}, medians "
        f"of {figures['rounds']} interleaved rounds. In int8: "
        f"{_stage_names(figures['stages_in_bytes'])}. The discriminator is in *everything else*."
    )
    return table(["stage", *found], rows, note=note)


def _stage_names(stages: Iterable[str]) -> str:
    words = {"downs": "encoder", "ups": "decoder"}
    parts = [name.split(".") for name in stages]
    return ", ".join(f"{words[part]} {int(index) + 1}" for part, index in parts)


def ranking(full: bool) -> str:
    """Rank correlation and AUROC by precision, of all scores or of the paper's."""
    figures = _read("stages_cpu.json")
    rows = [
        (
            precision,
            f"`{name}`",
            f"{row['rank_correlation']:.4f}",
            f"{row['noise']:.3f}",
            f"{row['auroc']:.4f}",
        )
        for precision, scores in figures["ranking"].items()
        for name, row in scores.items()
        if full or (name == "discriminator_instance" and " " not in precision)
    ]
    about = figures["about"]
    note = (
        f"{figures['images']} test images of ZhangLab; the model was trained for {about['epochs']} "
        f"epochs on {about['training_images']} normal ones, too few for the paper's AUROC."
    )
    head = ["precision", "score", "rank correlation", "noise", "AUROC"]
    return table(head, rows, text=2, note=note)


def memory() -> str:
    """Peak memory of screening by the number of files."""
    rows = [
        (
            f"{row['files']:,}",
            f"{row['run_mb']:.0f}",
            f"{row['reader_mb']:.0f}",
            f"{row['files'] / row['seconds']:.0f}",
        )
        for row in _read("memory.json")["runs"]
    ]
    note = "Largest resident memory of `squid-fast screen`, with a tiny model."
    return table(["files", "the run, MB", "each reader, MB", "files/s"], rows, text=0, note=note)


def cost(name: str) -> str:
    """What screening many images costs, with the assumptions as they stand."""
    return COSTS[name](read_rates(measurements.RESULTS), Assumptions())


TABLES = {
    "speed": partial(speed, "cpu"),
    "speed_cuda": partial(speed, "cuda"),
    "threads": threads,
    "stages": stages,
    "ranking": partial(ranking, True),
    "precision": partial(ranking, False),
    "memory": memory,
    **{name: partial(cost, name) for name in COSTS},
}
