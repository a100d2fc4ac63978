"""Screening on many machines through Ray Data.

    from squid_fast.screening.ray import gather_table, screen_with_ray

    screen_with_ray("bundle/", ["/archive/**/*.dcm"], "/archive/scores/")
    gather_table("/archive/scores/", "scores.parquet")

Tasks decode images, actors score them and tasks write Parquet files, all at the same time. Every
machine needs squid_fast, and must find the images, the bundle and the folder of the results at the
same paths, on shared storage. A machine, task or actor that is lost is replaced, and its work is
done again. Without a running cluster, one is started on this machine; ``ray.init`` chooses another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.listing import LeftOut
from ...utils.atomic import write_json
from ...utils.devices import ScoringPrecision
from ...utils.extras import require
from ..pipeline import ScreenRow
from ..reading.files import PathInput, find_files
from ..reading.source import Source
from ..results import write_table
from .images import cut_listing, decode
from .scorers import ScorerPool

if TYPE_CHECKING:
    from ray.data import Dataset

compute = require("pyarrow.compute", "ray")
dataset_files = require("pyarrow.dataset", "ray")
ray = require("ray", "ray")
require("ray.data", "ray")

_FILES = require("pyarrow.fs", "ray").LocalFileSystem()
_SUMMARY = "_summary.json"  # Arrow ignores files whose name begins with an underscore
_FILES_PER_TASK = 4096  # starting its reader process takes as long as some hundred small files
_ROWS_PER_FILE = 1 << 18  # of the results
_MEMORY = 1 << 29  # bytes for reading an image of MAX_PIXELS


def screen_with_ray(
    bundle: PathInput,
    inputs: PathInput | Iterable[PathInput],
    out_folder: PathInput,
    *,
    batch_size: int = 32,
    scorers: int | None = None,
    cpus_per_scorer: int = 1,
    gpus_per_scorer: float | None = None,
    precision: ScoringPrecision = "auto",
    score: str | None = None,
    timeout: float = 60.0,
) -> dict[str, Any]:
    """Score every image in ``inputs`` into Parquet files in ``out_folder``.

    The rows are those of ``screen`` in any order: the column ``index`` is a row's place in that
    order, from 0. ``_summary.json`` beside the files holds what is returned. Until all rows are
    there, the folder is called ``out_folder`` + ``.partial``.

    Args:
        bundle: folder of a trained model.
        inputs, batch_size, timeout: see ``screen``; the files are listed on this machine.
        out_folder: folder for the results. It is made, and may exist if it is empty.
        scorers: number of actors that score. By default there are as many as the cluster has room
            for now, with an eighth of its CPUs left for decoding; give a number if it is to grow.
        cpus_per_scorer: number of CPUs, and of threads, of each scorer.
        gpus_per_scorer: number of GPUs of each scorer, by default one if the cluster has any.
        precision: see ``squid_fast.Scorer``; "auto" is decided once for all scorers.
        score: name of the score, by default the bundle's own.

    Returns:
        The numbers of rows ``count``, ``scored``, ``flagged`` and ``errors``, the scorer's
        ``threshold`` and ``score_name``, and ``left_out``, the number of files that are no images
        by kind.

    Raises:
        FileExistsError: ``out_folder`` is not empty, or holds an unfinished run.
        ValueError: an argument is out of range, or the cluster has no room for a scorer.
        BundleError: ``bundle`` cannot be loaded on the machine of a scorer.
        RuntimeError: rows are missing.
    """
    out = Path(out_folder).absolute()
    partial = out.with_name(out.name + ".partial")
    for folder in (out, partial):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(
                f"{str(folder)!r} is there and no empty folder; delete it or name another"
            )
    pool = ScorerPool.fit(
        bundle, batch_size, scorers, cpus_per_scorer, gpus_per_scorer, precision, score
    )
    left_out = LeftOut()
    source = Source(find_files(inputs, left_out))
    # Small runs are cut smaller, so that all CPUs have work.
    even = len(source.paths) // (4 * pool.scorers)
    listing = list(cut_listing(source, min(_FILES_PER_TASK, max(batch_size, even))))
    partial.mkdir(parents=True, exist_ok=True)
    if listing:
        decoded = ray.data.from_arrow(listing).map_batches(
            decode,
            batch_format="pyarrow",
            fn_args=(pool.image_size, timeout, os.getcwd()),
            # Asking for memory also keeps Ray Data from decoding inside the scorers.
            num_cpus=1,
            memory=_MEMORY,
        )
        pool.score(decoded).write_parquet(
            str(partial),
            filesystem=_FILES,  # without it, some characters in a path have a special meaning
            min_rows_per_file=_ROWS_PER_FILE,
            compression="zstd",
        )
    summary = _count(partial) | {
        "threshold": pool.threshold, "score_name": pool.score_name, "left_out": left_out.counts,
    }  # fmt: skip
    if summary["count"] != len(source):
        raise RuntimeError(
            f"{str(partial)!r} holds {summary['count']} rows for {len(source)} images"
        )
    write_json(summary, partial / _SUMMARY)
    os.replace(partial, out)
    return summary


def score_dataset(
    dataset: Dataset,
    bundle: PathInput,
    *,
    batch_size: int = 32,
    scorers: int | None = None,
    cpus_per_scorer: int = 1,
    gpus_per_scorer: float | None = None,
    precision: ScoringPrecision = "auto",
    score: str | None = None,
) -> Dataset:
    """Score the images of a dataset, lazily; see ``screen_with_ray``.

    Args:
        dataset: a dataset with the columns ``path``, bytes or text; ``image``, the S x S bytes of
            a uint8 image, 255 = 1.0, or null; ``error``, why there is no image, or null.

    Returns:
        The columns of ``COLUMNS``, and the other columns of ``dataset``.

    Raises:
        ValueError: also when the dataset is read, if an image has another size.
    """
    pool = ScorerPool.fit(
        bundle, batch_size, scorers, cpus_per_scorer, gpus_per_scorer, precision, score
    )
    return pool.score(dataset)


def gather_table(folder: PathInput, path: PathInput) -> None:
    """Gather the results of ``screen_with_ray`` in one table, in the order of the listing.

    The suffix of ``path`` chooses the format, see ``write_table``.

    Raises:
        ValueError: the rows in the folder are not those of one complete run.
        OSError: the folder cannot be read, or the table cannot be written.
    """
    folder = Path(folder)
    count = json.loads((folder / _SUMMARY).read_bytes())["count"]
    table = _open(folder).to_table()
    if count:
        table = table.sort_by("index")
        if not np.array_equal(table["index"], np.arange(count)):
            raise ValueError(f"{str(folder)!r} holds not the {count} rows of a whole run")
        table = table.drop_columns(["index"])
    batches = table.to_batches()
    write_table((ScreenRow(**row) for batch in batches for row in batch.to_pylist()), path)


def _open(folder: Path) -> Any:
    return dataset_files.dataset(str(folder.absolute()), filesystem=_FILES, format="parquet")


def _count(folder: Path) -> dict[str, int]:
    files = _open(folder)
    if not (count := files.count_rows()):
        return dict.fromkeys(("count", "scored", "flagged", "errors"), 0)
    errors = files.count_rows(filter=compute.field("error").is_valid())
    flagged = files.count_rows(filter=compute.field("flag"))
    return {"count": count, "scored": count - errors, "flagged": flagged, "errors": errors}
