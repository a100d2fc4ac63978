"""Scoring on a cluster: actors that hold a scorer each."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...inference import Scorer
from ...utils.devices import ScoringPrecision
from ...utils.extras import require
from ..pipeline import score_batch
from ..reading.files import PathInput
from ..reading.worker import Decoded
from ..results import arrow_batch

if TYPE_CHECKING:
    from pyarrow import Table
    from ray.data import Dataset

ray = require("ray", "ray")
require("ray.data", "ray")

_IMAGE_COLUMNS = ("path", "image", "error")


@dataclasses.dataclass(frozen=True)
class ScorerPool:
    """The scorers of a run: how many there are, what each needs, and what all have in common."""

    bundle: str
    device: str
    batch_size: int
    scorers: int
    cpus: int
    gpus: float
    score_name: str
    precision: ScoringPrecision
    image_size: int
    threshold: float
    fingerprint: str

    @classmethod
    def fit(
        cls,
        bundle: PathInput,
        batch_size: int,
        scorers: int | None,
        cpus: int,
        gpus: float | None,
        precision: ScoringPrecision,
        score: str | None,
    ) -> ScorerPool:
        """Fit a pool to the cluster, and load the bundle once on a machine for a scorer."""
        counts = {"batch_size": batch_size, "cpus_per_scorer": cpus, "scorers": scorers}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not ray.is_initialized():
            ray.init()
        there = ray.cluster_resources()
        if gpus is None:
            gpus = 1 if there.get("GPU") else 0
        if scorers is None:
            scorers = _room(cpus, gpus)
            if scorers < 1:
                raise ValueError(
                    f"a scorer needs {cpus} CPUs and {gpus:g} GPUs, and decoding a CPU; the "
                    f"cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"
                )
        folder, device = os.path.abspath(bundle), "cuda" if gpus else "cpu"
        describe = ray.remote(num_cpus=cpus, num_gpus=gpus)(_describe_scorer)
        facts = ray.get(describe.remote(folder, score, precision, device))
        return cls(folder, device, batch_size, scorers, cpus, gpus, **facts)

    def score(self, dataset: Dataset) -> Dataset:
        """Score rows of images lazily, see ``score_dataset``."""
        return dataset.map_batches(
            _ScorerActor,
            fn_constructor_args=(self,),
            batch_size=self.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=self.scorers),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )


def _room(cpus: int, gpus: float) -> int:
    """Number of scorers that fit onto the cluster and leave CPUs for decoding."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = sum(machine.get("CPU", 0) for machine in machines)
    room = 0
    for machine in machines:
        by_cpus = machine.get("CPU", 0) // cpus
        room += int(min(by_cpus, machine.get("GPU", 0) // gpus) if gpus else by_cpus)
    return min(room, int((total - max(1, total // 8)) // cpus))


def _describe_scorer(
    bundle: str, score: str | None, precision: ScoringPrecision, device: str
) -> dict[str, Any]:
    scorer = Scorer.load(bundle, score, precision, device)
    names = ("score_name", "precision", "image_size", "threshold", "fingerprint")
    return {name: getattr(scorer, name) for name in names}


class _ScorerActor:
    def __init__(self, pool: ScorerPool) -> None:
        torch.set_num_threads(pool.cpus)
        self._scorer = Scorer.load(pool.bundle, pool.score_name, pool.precision, pool.device)
        if self._scorer.fingerprint != pool.fingerprint:
            raise RuntimeError(
                f"{pool.bundle!r} has changed since the run began, or is not the same everywhere"
            )

    def __call__(self, batch: Table) -> Table:
        """Replace the columns of images with those of scores."""
        columns = (batch[name].to_pylist() for name in _IMAGE_COLUMNS)
        rows = score_batch(self._scorer, list(map(self._item, *columns)))
        table, scored = batch.drop_columns(list(_IMAGE_COLUMNS)), arrow_batch(rows)
        for name, column in zip(scored.schema.names, scored.columns, strict=True):
            table = table.append_column(name, column)
        return table

    def _item(self, path: bytes | str, image: bytes | None, error: str | None) -> Decoded:
        size = self._scorer.image_size
        if image is None:
            return Decoded(os.fsdecode(path), None, error or "there is no image")
        if len(image) != size**2:
            raise ValueError(f"an image has {len(image)} bytes; {size} x {size} are needed")
        pixels = np.frombuffer(image, np.uint8).reshape(size, size)
        return Decoded(os.fsdecode(path), pixels)
