"""The screening pipeline: files in, rows of scores out, in order and with bounded memory."""

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

from ..utils.text import one_line
from .reading.files import PathInput, find_files
from .reading.pool import TIMEOUT, check_reading
from .reading.source import Source
from .reading.worker import Decoded

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
    """What screening needs of a scorer; ``squid_fast.Scorer`` has all of it."""

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
        """A text that differs if the model, calibration, score, precision or backend differs."""
        ...

    def prefetch(self, images: torch.Tensor) -> torch.Tensor:
        """Start copying uint8 images [B, 1, S, S] to the device; returns what ``score`` takes."""
        ...

    def score(self, images: torch.Tensor, reconstruction: bool = False) -> ScoresLike:
        """Scores of images [B, 1, S, S]: uint8 with 255 = 1.0, or floats in [0, 1]."""
        ...


@dataclass(frozen=True)
class ScreenRow:
    """The result for one image: either its scores or an error.

    Attributes:
        path: the file as it was named or found; bytes that are not UTF-8 are kept as surrogates.
        raw_score: the score in its own unit, see ``Scorer.score_name``.
        z_score: standard deviations from the mean of normal training images; a greater value is
            less normal. Rank images by this one.
        anomaly_score: ``sigmoid(z_score)``, in [0, 1], 1 = anomalous. It saturates in float32 and
            is not a probability of disease.
        flag: whether ``z_score > threshold``.
        error: why there is no score, in one sentence; then the scores and the flag are None.
        error_kind: the error without what is particular to the file, by which a report groups
            errors. It is not a column of tables, and None where it is not known.

    >>> row = ScreenRow("scan.png", 0.31, 2.5, 0.924, True, threshold=1.64, error=None)
    >>> row.flag
    True
    """

    path: str
    raw_score: float | None
    z_score: float | None
    anomaly_score: float | None
    flag: bool | None
    threshold: float
    error: str | None
    error_kind: str | None = None


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
    """Score every image in ``inputs``; yields one row for each, in the order of ``find_files``.

    A file that cannot be read becomes a row with an error. So does a file that crashes its decoder,
    keeps it busy for longer than ``timeout`` or would take more than 4 GiB of memory. Files are
    decoded two batches ahead, so memory does not grow with their number. Packed images, which
    ``pack`` writes, give a row each. If the device has too little memory for a batch, batches are
    halved from then on.

    Args:
        scorer: a ``squid_fast.Scorer``, or any object with the methods of ``ScorerLike``.
        inputs: files, folders and globs, see ``find_files``.
        batch_size: number of images scored at once.
        workers: number of processes that decode, by default one for each core and at most 16. With
            0, files are decoded in this process, which a damaged file can then crash or block.
        on_progress: called as ``on_progress(rows_done, rows_in_total)`` after every batch.
        timeout: seconds after which a file is given up.
        skip: number of rows at the start to leave out, which count as done.

    Raises:
        ValueError: ``batch_size``, ``workers``, ``timeout`` or ``skip`` is out of range.
        RuntimeError: no processes can be started.
        Exception: whatever the scorer raises, after the rows of earlier batches.

    >>> from types import SimpleNamespace
    >>> def score(images):
    ...     z = images.float().mean(dim=(1, 2, 3)) / 100
    ...     return SimpleNamespace(raw=z, z_score=z, anomaly_score=z.sigmoid())
    >>> scorer = SimpleNamespace(image_size=32, threshold=1.64, prefetch=torch.clone, score=score)
    >>> np.save("scan.npy", np.full((40, 30), 200, dtype=np.uint8))
    >>> [(row.path, row.z_score, row.flag) for row in screen(scorer, "scan.npy", workers=0)]
    [('scan.npy', 2.0, True)]
    """
    source = Source(find_files(inputs))
    batches = screen_batches(scorer, source, batch_size, workers, timeout, skip)

    def one_by_one() -> Generator[ScreenRow, None, None]:
        done = skip
        with closing(batches):
            for rows in batches:
                done += len(rows)
                if on_progress is not None:
                    on_progress(done, len(source))
                yield from rows

    return one_by_one()


def screen_batches(
    scorer: ScorerLike,
    source: Source,
    batch_size: int,
    workers: int | None,
    timeout: float,
    skip: int,
) -> Generator[list[ScreenRow], None, None]:
    """Score the images of ``source``, see ``screen``; yields the rows of each batch."""
    for name, value, least in (("batch_size", batch_size, 1), ("skip", skip, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    workers = check_reading(workers, timeout)
    look_ahead = max(2 * batch_size, 4 * workers)
    images = source.read(scorer.image_size, workers, look_ahead, timeout, first=skip)
    return _scored(scorer, images, batch_size)


def score_batch(scorer: ScorerLike, items: Sequence[Decoded]) -> list[ScreenRow]:
    """Score decoded images at once; returns their rows and those of errors, in order."""
    return _rows(scorer, items, _prefetch(scorer, items), _Portions(len(items)))


@dataclass
class _Portions:
    """The number of images scored at once, which becomes smaller when memory runs out."""

    most: int


def _scored(
    scorer: ScorerLike, images: Generator[Decoded, None, None], batch_size: int
) -> Generator[list[ScreenRow], None, None]:
    portions = _Portions(batch_size)
    with closing(images):
        batches = ((items, _prefetch(scorer, items)) for items in _batches(images, batch_size))
        # In pairs, so that each batch is copied to the device while the one before is scored.
        for batch, _ in itertools.pairwise(itertools.chain(batches, [None])):
            assert batch is not None
            yield _rows(scorer, *batch, portions)


def _batches(decoded: Iterable[Decoded], batch_size: int) -> Iterator[list[Decoded]]:
    """Group results by ``batch_size`` images, with the errors between them.

    Errors before the first image do not wait for it, and a long run of errors ends a group early.
    """
    batch: list[Decoded] = []
    images = 0
    for item in decoded:
        batch.append(item)
        images += item.image is not None
        if images in (0, batch_size) or len(batch) >= 4 * batch_size:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def _prefetch(scorer: ScorerLike, items: Sequence[Decoded]) -> torch.Tensor | None:
    """Start copying the images among the items, uint8 [B, 1, S, S], to the device."""
    images = [item.image for item in items if item.image is not None]
    if not images:
        return None
    batch = torch.from_numpy(np.stack(images)).unsqueeze(1)
    try:
        return scorer.prefetch(batch)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return batch  # there may be memory for portions of it when they are scored


def _rows(
    scorer: ScorerLike, items: Sequence[Decoded], images: torch.Tensor | None, portions: _Portions
) -> list[ScreenRow]:
    threshold = float(scorer.threshold)
    scored = iter([] if images is None else _score(scorer, images, portions))
    rows = []
    for item in items:
        if item.image is not None:
            row = _scored_row(item.path, *next(scored), threshold)
        else:
            row = ScreenRow(
                item.path, None, None, None, None, threshold, item.error, item.error_kind
            )
        rows.append(row)
    return rows


def _score(
    scorer: ScorerLike, images: torch.Tensor, portions: _Portions
) -> list[tuple[float, float, float]]:
    """Raw score, z-score and anomaly score of each image, computed in portions if need be."""
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
                one_line(str(error))[:200],
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
    text = str(error).lower()  # on a CPU there is no type for it
    return isinstance(error, RuntimeError) and any(
        reason in text for reason in ("not enough memory", "can't allocate memory", "out of memory")
    )


def _scored_row(path: str, raw: float, z: float, anomaly: float, threshold: float) -> ScreenRow:
    if all(map(math.isfinite, (raw, z, anomaly))):
        return ScreenRow(path, raw, z, anomaly, z > threshold, threshold, None)
    kind = "the score is not a finite number"
    error = f"{kind} (raw {raw}, z {z}, anomaly {anomaly})"
    return ScreenRow(path, None, None, None, None, threshold, error, kind)
