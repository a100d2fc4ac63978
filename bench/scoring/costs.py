"""Time and price of screening 10^6, 10^8 and 10^9 images, from measured rates.

Prints the tables of ``bench/results/scale.md`` for other assumptions than those made there. The
rates are those that the commands ``speed`` and ``decoding`` have measured.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import add_option
from ..markdown import table
from ..measurements import RESULTS, read

COUNTS = {"10⁶": 10**6, "10⁸": 10**8, "10⁹": 10**9}

Limits = dict[str, float]  # images/s by what allows no more


def _assumed(default: float, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Assumptions:
    """What is not measured; every field is an option of the command."""

    disk_mb: float = _assumed(500.0, "MB/s that one machine reads from its disk")
    network_gbit: float = _assumed(10.0, "Gbit/s of the network of one machine")
    store_gbit: float = _assumed(100.0, "Gbit/s of the storage that a cluster shares")
    gpu_cores: int = _assumed(16, "Number of cores beside one GPU")
    cluster_cores: int = _assumed(64, "Number of cores of one machine of a cluster")
    machines: int = _assumed(10, "Number of machines of a cluster")
    core_hour: float = _assumed(0.05, "Price of a core-hour in USD")
    terabyte_month: float = _assumed(20.0, "Price of a terabyte-month in USD")


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    bytes: float  # of one file
    decoding: float  # seconds that one core takes for it


@dataclass(frozen=True)
class Rates:
    """What was measured."""

    formats: dict[str, Format]  # by name; the packed one is its pixels, and free to decode
    cores: int  # of the machine that scored
    scorer: float  # images/s that it scored on all of them
    gpu: float | None  # images/s of one GPU, if it has been measured
    device: str  # the processor that scored
    decoding_device: str


def read_rates(folder: Path = RESULTS) -> Rates:
    """The rates in a folder of results."""
    decoding = read(folder / "decoding_cpu.json")
    files, side = decoding["files"], decoding["side"]
    formats = {name: Format(x["bytes"], 1 / x["files_per_second"]) for name, x in files.items()}
    formats[f"packed {side} × {side}"] = Format(side**2, 0.0)
    cpu = read(folder / "speed_cpu.json")["evaluation"]
    cuda = read(folder / "speed_cuda.json")
    gpu = _best(cuda["evaluation"]) if cuda else None
    return Rates(formats, cpu["threads"], _best(cpu), gpu, cpu["device"], decoding["device"])


def _best(evaluation: dict[str, Any]) -> float:
    rows = evaluation["rows"].items()
    return max(row["images_per_second"] for name, row in rows if name.startswith("squid_fast"))


def ceilings(rates: Rates, form: Format, cores: int, scoring: bool, a: Assumptions) -> Limits:
    """Images/s that the cores of one machine, its disk and its network allow.

    With ``scoring`` the cores score as well as decode; otherwise a GPU scores.
    """
    busy = form.decoding + (rates.cores / rates.scorer if scoring else 0.0)
    return {
        "cores": cores / busy if busy else float("inf"),
        "disk": a.disk_mb * 1e6 / form.bytes,
        "network": a.network_gbit * 1e9 / 8 / form.bytes,
    }


def first_limit(limits: Limits) -> tuple[str, float]:
    """The least of the ceilings: its name and images/s."""
    return min(limits.items(), key=lambda item: item[1])


def inputs(rates: Rates, a: Assumptions) -> str:
    """Everything the other tables are made of."""
    rows = [(f"scoring on {rates.cores} cores", f"{rates.scorer:.1f} images/s", rates.device)]
    if rates.gpu:
        rows.append(("scoring on one GPU", f"{rates.gpu:,.0f} images/s", "measured"))
    for name, form in rates.formats.items():
        if form.decoding:
            value = f"{1 / form.decoding:,.0f} files/s of {_bytes(form.bytes)}"
            rows.append((f"decoding {name} on one core", value, rates.decoding_device))
        else:
            rows.append((name, _bytes(form.bytes), "one byte for each pixel"))
    assumed = {
        "disk of one machine": f"{a.disk_mb:g} MB/s",
        "network of one machine": f"{a.network_gbit:g} Gbit/s",
        "storage shared by a cluster": f"{a.store_gbit:g} Gbit/s",
        "cores beside one GPU": f"{a.gpu_cores}",
        "cluster": f"{a.machines} machines of {a.cluster_cores} cores",
        "price of a core-hour": f"{a.core_hour:g} USD",
        "price of a terabyte-month": f"{a.terabyte_month:g} USD",
    }
    rows += [(name, value, "assumed") for name, value in assumed.items()]
    return table(["input", "value", "from"], rows, text=3)


def storage(rates: Rates, a: Assumptions) -> str:
    """What the images take on a disk, and the time that the network needs for them."""
    rows = []
    for name, form in rates.formats.items():
        sizes = [_bytes(count * form.bytes) for count in COUNTS.values()]
        most = max(COUNTS.values()) * form.bytes
        price = f"{most / 1e12 * a.terabyte_month:,.0f} USD"
        rows.append((name, *sizes, _time(most / (a.network_gbit * 1e9 / 8)), price))
    last = list(COUNTS)[-1]
    head = ["format", *COUNTS, f"{last} at {a.network_gbit:g} Gbit/s", f"{last} for a month"]
    return table(head, rows)


def laptop(rates: Rates, a: Assumptions) -> str:
    """One machine without a GPU, of as many cores as were measured."""
    rows = []
    for name, form in rates.formats.items():
        limit, speed = first_limit(ceilings(rates, form, rates.cores, True, a))
        hours = rates.cores * COUNTS["10⁶"] / speed / 3600
        rows.append((name, f"{speed:,.1f}", limit, *_times(speed), f"{hours:,.0f}"))
    return table(["format", "images/s", "limit", *COUNTS, "core-hours for 10⁶"], rows)


def one_gpu(rates: Rates, a: Assumptions) -> str:
    """What feeds a GPU: its scorer is the limit as long as it is slower than all of these."""
    rows = []
    for name, form in rates.formats.items():
        limits = ceilings(rates, form, a.gpu_cores, False, a)
        cells = [f"{speed:,.0f}" if np.isfinite(speed) else "–" for speed in limits.values()]
        if rates.gpu:
            limits["GPU"] = rates.gpu
        limit, speed = first_limit(limits)
        rows.append((name, *cells, limit, *_times(speed)))
    head = [f"{a.gpu_cores} cores decode", f"disk {a.disk_mb:g} MB/s"]
    head += [f"network {a.network_gbit:g} Gbit/s", "first limit", *COUNTS]
    note = (
        "**No scorer has been measured on a GPU yet.** The times are the least that the files "
        "allow. A GPU that scores more images/s than the first limit waits for them; one that "
        "scores fewer takes longer than this in the same ratio."
    )
    if rates.gpu:
        note = f"The GPU itself scores {rates.gpu:,.0f} images/s, measured."
    return table(["format", *head], rows, note=note)


def cluster(rates: Rates, a: Assumptions) -> str:
    """Machines without GPUs that read from one shared storage."""
    rows = []
    for name, form in rates.formats.items():
        own = ceilings(rates, form, a.cluster_cores, True, a)
        del own["disk"]  # the files are not on it
        limit, speed = first_limit(own)
        store = a.store_gbit * 1e9 / 8 / form.bytes
        limit, total = first_limit({limit: a.machines * speed, "storage": store})
        hours = COUNTS["10⁶"] / total * a.machines * a.cluster_cores / 3600
        cells = (f"{total:,.0f}", limit, f"{store / speed:,.0f}", *_times(total))
        rows.append((name, *cells, f"{hours:,.0f}", f"{hours * a.core_hour:,.2f} USD"))
    head = [f"images/s of {a.machines} machines", "limit", "machines that the storage feeds"]
    return table(["format", *head, *COUNTS, "core-hours for 10⁶", "price of 10⁶"], rows)


TABLES: dict[str, Callable[[Rates, Assumptions], str]] = {
    "scale_inputs": inputs,
    "scale_storage": storage,
    "scale_laptop": laptop,
    "scale_gpu": one_gpu,
    "scale_cluster": cluster,
}


def _times(speed: float) -> list[str]:
    return [_time(count / speed) for count in COUNTS.values()]


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"


def _time(seconds: float) -> str:
    for unit, length in (("years", 365 * 86400), ("days", 2 * 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / (86400 if unit == 'days' else length):,.1f} {unit}"
    return f"{seconds:.1f} s"


def add_arguments(parser: ArgumentParser) -> None:
    for assumed in fields(Assumptions):
        name = f"--{assumed.name.replace('_', '-')}"
        add_option(parser, name, assumed.default, assumed.metadata["meaning"])


def main(options: Namespace) -> None:
    """Print the tables."""
    assumptions = Assumptions(**{x.name: getattr(options, x.name) for x in fields(Assumptions)})
    rates = read_rates()
    print("\n\n".join(make(rates, assumptions) for make in TABLES.values()))
