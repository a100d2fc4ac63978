"""Files in, scored rows out, in the order given, with bounded memory."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from .reading.files import PathInput, find_files
from .reading.pool import TIMEOUT, Decoded, check_reading, read_ahead
from .reading.shards import count_rows, is_shard, read_shard

_log = logging.getLogger("squid_fast")


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
    @property
    def fingerprint(self) -> str:
        """Differs where model, calibration, score or precision do."""
        ...

    def prefetch(self, images: torch.Tensor) -> torch.Tensor:
        """Start the way of uint8 images [B, 1, S, S] to the device; what ``score`` takes."""
        ...

    def score(self, images: torch.Tensor, reconstruction: bool = False) -> ScoresLike:
        """Scores of images [B, 1, S, S]: uint8 with 255 = 1.0, or floats in [0, 1]."""
        ...


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
    *,
    timeout: float = TIMEOUT,
    skip: int = 0,
) -> Generator[ScreenRow, None, None]:
    """Score every image in ``inputs``; one row per file, in the order of `find_files`.

    A file that cannot be read becomes a row with an error, and so does one that crashes its
    decoder, keeps it busy for longer than ``timeout`` or would take more than 4 GiB. Files are
    decoded ahead by processes, two batches of them, so memory does not grow with their number.
    Batches are filled across folders. A shard, which `squid-fast pack` writes, stands for its rows.
    Where the device has no memory for a batch, batches are halved from there on.

    Args:
        scorer: see `ScorerLike`.
        inputs: files, folders and globs, see `find_files`.
        batch_size: images scored at once.
        workers: processes that decode; by default one per available core, 16 at most. 0 decodes
            in this process, where nothing protects it from what a file does to its decoder.
        on_progress: called as ``on_progress(rows_done, rows_in_total)`` after every batch.
        timeout: seconds after which a file is given up.
        skip: rows that have been done before; they are left out, but count as done.

    Raises:
        ValueError: ``batch_size``, ``workers``, ``timeout`` or ``skip`` is out of range.
        RuntimeError: no processes can be started.
        Exception: whatever the scorer raises; the rows of earlier batches have been yielded.
    """
    files = find_files(inputs)
    return screen_listing(
        scorer, files, batch_size, workers, on_progress, timeout=timeout, skip=skip
    )


def screen_listing(
    scorer: ScorerLike,
    files: Sequence[str],
    batch_size: int = 32,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    timeout: float = TIMEOUT,
    skip: int = 0,
) -> Generator[ScreenRow, None, None]:
    """`screen` for files that `find_files` has found."""
    for name, value, least in (("batch_size", batch_size, 1), ("skip", skip, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    workers = check_reading(workers, timeout)
    return _screen_listing(scorer, files, batch_size, workers, on_progress, timeout, skip)


def score_batch(scorer: ScorerLike, items: Sequence[Decoded]) -> list[ScreenRow]:
    """The rows of decoded images, which are scored at once, and of the errors between them."""
    return _rows(scorer, items, _prefetch(scorer, items), _Portions(len(items)))


@dataclass
class _Portions:
    """How many images are scored at once; less for good where memory runs out."""

    most: int


_Batch = tuple[Sequence[Decoded], torch.Tensor | None]  # its images, where it has any


def _screen_listing(
    scorer: ScorerLike,
    files: Sequence[str],
    batch_size: int,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
    timeout: float,
    skip: int,
) -> Generator[ScreenRow, None, None]:
    look_ahead = max(2 * batch_size, 4 * workers)
    total = sum(_count(path) for path in files)
    done = skip
    portions = _Portions(batch_size)
    with closing(_read(files, skip, scorer.image_size, workers, look_ahead, timeout)) as decoded:
        batches: Iterator[_Batch] = (
            (items, _prefetch(scorer, items)) for items in _batches(decoded, batch_size)
        )
        end: _Batch = ((), None)
        # In pairs, so that each batch is on its way while the one before is scored.
        for (items, images), _ in itertools.pairwise(itertools.chain(batches, [end])):
            rows = _rows(scorer, items, images, portions)
            done += len(rows)
            if on_progress is not None:
                on_progress(done, total)
            yield from rows


def _read(
    files: Sequence[str], skip: int, size: int, workers: int, look_ahead: int, timeout: float
) -> Generator[Decoded, None, None]:
    """What a listing stands for, but for the first ``skip`` rows of it."""
    first = 0
    while first < len(files) and skip >= (count := _count(files[first])):
        skip -= count
        first += 1
    rest = files[first:]
    unpacked = (path for path in rest if not is_shard(path))
    with closing(read_ahead(unpacked, size, workers, look_ahead, timeout)) as images:
        for path in rest:
            if is_shard(path):
                yield from itertools.islice(read_shard(path, size), skip, None)
                skip = 0
            else:
                yield next(images)


def _count(path: str) -> int:
    return count_rows(path) if is_shard(path) else 1


def _batches(decoded: Iterable[Decoded], batch_size: int) -> Iterator[list[Decoded]]:
    """Group files so that each group holds ``batch_size`` images, errors travelling along.

    Errors in front of the first image do not wait for it, and a long run of errors ends a group
    early.
    """
    batch: list[Decoded] = []
    images = 0
    for item in decoded:
        batch.append(item)
        images += not isinstance(item[1], str)
        if images in (0, batch_size) or len(batch) >= 4 * batch_size:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def _prefetch(scorer: ScorerLike, items: Sequence[Decoded]) -> torch.Tensor | None:
    """The images among the items, uint8 [B, 1, S, S], on their way to the device."""
    images = [image for _, image in items if not isinstance(image, str)]
    if not images:
        return None
    batch = torch.from_numpy(np.stack(images)).unsqueeze(1)
    try:
        return scorer.prefetch(batch)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return batch  # its portions may find room when it is their turn


def _rows(
    scorer: ScorerLike,
    items: Sequence[Decoded],
    images: torch.Tensor | None,
    portions: _Portions,
) -> list[ScreenRow]:
    threshold = float(scorer.threshold)
    scored = iter([] if images is None else _score(scorer, images, portions))
    rows = []
    for path, image in items:
        if isinstance(image, str):
            rows.append(ScreenRow(path, None, None, None, None, threshold, image))
        else:
            rows.append(_scored_row(path, *next(scored), threshold))
    return rows


def _score(
    scorer: ScorerLike, images: torch.Tensor, portions: _Portions
) -> list[tuple[float, float, float]]:
    """Raw score, z-score and anomaly score of each image; at once if there is memory for it."""
    scored: list[tuple[float, float, float]] = []
    while len(scored) < len(images):
        portion = images[len(scored) : len(scored) + portions.most]
        try:
            scores = scorer.score(portion)
        except Exception as error:
            if len(portion) == 1 or not _is_out_of_memory(error):
                raise
            portions.most = len(portion) // 2
            _log.warning(
                "%d images at once take more memory than there is, %d from now on (%s)",
                len(portion),
                portions.most,
                " ".join(str(error).split())[:200],
            )
            continue
        columns = (scores.raw, scores.z_score, scores.anomaly_score)
        triples = list(zip(*(column.tolist() for column in columns), strict=True))
        if len(triples) != len(portion):
            raise RuntimeError(f"the scorer gave {len(triples)} scores for {len(portion)} images")
        scored += triples
    return scored


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()  # a CPU without memory has no type of its own
    return isinstance(error, RuntimeError) and any(
        reason in text for reason in ("not enough memory", "can't allocate memory", "out of memory")
    )


def _scored_row(path: str, raw: float, z: float, anomaly: float, threshold: float) -> ScreenRow:
    if all(map(math.isfinite, (raw, z, anomaly))):
        return ScreenRow(path, raw, z, anomaly, z > threshold, threshold, None)
    error = f"the score is not a finite number (raw {raw}, z {z}, anomaly {anomaly})"
    return ScreenRow(path, None, None, None, None, threshold, error)
