"""Files in, scored rows out, in the order given, with bounded memory."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from squid_fast.data import ImageReadError, load_image
from squid_fast.screening.files import PathInput, explain_no_file, find_files


class ScoresLike(Protocol):
    """Scores of a batch: float32 CPU tensors [B], reconstructions [B, 1, H, W] or None."""

    @property
    def raw(self) -> torch.Tensor: ...
    @property
    def z_score(self) -> torch.Tensor: ...
    @property
    def anomaly_score(self) -> torch.Tensor: ...
    @property
    def reconstruction(self) -> torch.Tensor | None: ...


class ScorerLike(Protocol):
    """What screening needs of a scorer; `squid_fast.Scorer` has it."""

    @property
    def image_size(self) -> int: ...
    @property
    def score_name(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @property
    def false_positive_rate(self) -> float: ...
    def score(self, images: torch.Tensor, reconstruction: bool = False) -> ScoresLike: ...


@dataclass(frozen=True)
class ScreenRow:
    """The result for one file: either scores or an error, never neither.

    Attributes:
        path: the file as it was named or found. Bytes of a name that are not UTF-8 are kept as
            surrogates, so that the file can be opened by this name.
        raw_score: the scorer's own figure, in the unit of its ``score_name``.
        z_score: standard deviations away from the mean of normal training images; the greater,
            the less normal. Rank by this one.
        anomaly_score: ``sigmoid(z_score)``, in [0, 1], 1 = anomalous. It saturates in float32
            and is not a probability of disease.
        flag: whether ``z_score > threshold``.
        threshold: the scorer's threshold, on the scale of ``z_score``.
        error: why there is no score, in one sentence; then the scores and the flag are None.
    """

    path: str
    raw_score: float | None
    z_score: float | None
    anomaly_score: float | None
    flag: bool | None
    threshold: float
    error: str | None


def screen(
    scorer: ScorerLike,
    inputs: PathInput | Iterable[PathInput],
    batch_size: int = 32,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[ScreenRow]:
    """Score every image in ``inputs``; one row per file, in the order of `find_files`.

    A file that cannot be read becomes a row with an error. Files are read ahead by threads, at
    most ``batch_size + workers`` of them, so memory does not grow with their number. Batches are
    filled across folders.

    Args:
        scorer: see `ScorerLike`.
        inputs: files, folders and globs, see `find_files`.
        batch_size: images scored at once.
        workers: threads that read files; by default one per available core, 16 at most.
        on_progress: called as ``on_progress(rows_done, rows_in_total)`` after every batch.

    Raises:
        ValueError: ``batch_size`` or ``workers`` is below one.
        Exception: whatever the scorer raises; the rows of earlier batches have been yielded.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if workers is None:
        workers = min(16, _available_cores())
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    return _screen_files(scorer, find_files(inputs), batch_size, workers, on_progress)


def load_or_explain(path: str, size: int) -> np.ndarray | str:
    """Read an image as float32 [size, size] in [0, 1], or say in a sentence why it cannot be."""
    try:
        if explanation := explain_no_file(path):
            return explanation
        image = load_image(path, size)
        if image.shape != (size, size):
            return f"the image was read as {image.shape}, not as ({size}, {size})"
        return image
    except ImageReadError as error:
        return _one_line(str(error)) or "the image cannot be read"
    except Exception as error:  # one bad file must not end the run
        return _one_line(f"{type(error).__name__}: {error}")


_Decoded = tuple[str, np.ndarray | str]


def _screen_files(
    scorer: ScorerLike,
    files: list[str],
    batch_size: int,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[ScreenRow]:
    done = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="squid-read")
    try:
        decoded = _decode_ahead(pool, files, scorer.image_size, batch_size + workers)
        for batch in _batches(decoded, batch_size):
            rows = _score_batch(scorer, batch)
            done += len(rows)
            if on_progress is not None:
                on_progress(done, len(files))
            yield from rows
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode_ahead(
    pool: ThreadPoolExecutor, files: list[str], size: int, look_ahead: int
) -> Iterator[_Decoded]:
    """Yield each file with its image or error, in order, ``look_ahead`` files being under way."""
    pending: deque[tuple[str, Future[np.ndarray | str]]] = deque()
    for path in files:
        if len(pending) == look_ahead:
            first, future = pending.popleft()
            yield first, future.result()
        pending.append((path, pool.submit(load_or_explain, path, size)))
    while pending:
        first, future = pending.popleft()
        yield first, future.result()


def _batches(decoded: Iterable[_Decoded], batch_size: int) -> Iterator[list[_Decoded]]:
    """Group files so that each group holds ``batch_size`` images, errors travelling along.

    Errors in front of the first image do not wait for it, and a long run of errors ends a group
    early.
    """
    batch: list[_Decoded] = []
    images = 0
    for item in decoded:
        batch.append(item)
        images += not isinstance(item[1], str)
        if images in (0, batch_size) or len(batch) >= 4 * batch_size:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def _score_batch(scorer: ScorerLike, batch: list[_Decoded]) -> list[ScreenRow]:
    threshold = float(scorer.threshold)
    images = [image for _, image in batch if not isinstance(image, str)]
    scored: Iterator[tuple[float, float, float]] = iter(())
    if images:
        scores = scorer.score(torch.from_numpy(np.stack(images)).unsqueeze(1))
        columns = (scores.raw, scores.z_score, scores.anomaly_score)
        triples = list(zip(*(column.tolist() for column in columns), strict=True))
        if len(triples) != len(images):
            raise RuntimeError(f"the scorer gave {len(triples)} scores for {len(images)} images")
        scored = iter(triples)
    rows = []
    for path, image in batch:
        if isinstance(image, str):
            rows.append(ScreenRow(path, None, None, None, None, threshold, image))
        else:
            rows.append(_scored_row(path, *next(scored), threshold))
    return rows


def _scored_row(path: str, raw: float, z: float, anomaly: float, threshold: float) -> ScreenRow:
    if all(map(math.isfinite, (raw, z, anomaly))):
        return ScreenRow(path, raw, z, anomaly, z > threshold, threshold, None)
    error = f"the score is not a finite number (raw {raw}, z {z}, anomaly {anomaly})"
    return ScreenRow(path, None, None, None, None, threshold, error)


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _one_line(text: str) -> str:
    return " ".join(text.split())
