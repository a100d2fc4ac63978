"""A whole dataset in memory, as uint8: 1.6 GB for a hundred thousand images of 128 x 128."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from .pixels import ImageReadError
from .readers import load_bytes
from .records import Record

UNKNOWN = -1
_CHUNK = 256
_SHOWN = 5


@dataclass
class ImageSet:
    """Images of one size with their labels.

    Attributes:
        images: uint8 ``[n, 1, S, S]``, 255 is 1.0.
        labels: int64 ``[n]``: 0 normal, 1 anomalous, -1 unknown.
        paths: where each image came from.
        broken: files that were left out, with what was wrong with each.

    Raises:
        ValueError: shapes, dtypes or lengths do not fit together.

    >>> pixels = torch.full((3, 1, 8, 8), 255, dtype=torch.uint8)
    >>> images = ImageSet(pixels, torch.tensor([0, 0, 1]), ["a.png", "b.png", "c.png"])
    >>> images.subset(images.labels == 1).paths
    ['c.png']
    """

    images: torch.Tensor
    labels: torch.Tensor
    paths: list[str]
    broken: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        square = self.images.ndim == 4 and shape[1] == 1 and shape[2] == shape[3]
        if self.images.dtype != torch.uint8 or not square:
            raise ValueError(f"images is {self.images.dtype} {shape}; uint8 [n, 1, S, S] is needed")
        if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
            raise ValueError(
                f"labels is {self.labels.dtype} {tuple(self.labels.shape)}; int64 [{shape[0]}] "
                "is needed, one for each image"
            )
        if len(self.paths) != shape[0]:
            raise ValueError(f"{len(self.paths)} paths for {shape[0]} images; one each is needed")

    def __len__(self) -> int:
        return self.images.shape[0]

    def batch(
        self,
        indices: torch.Tensor | Sequence[int] | slice,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Some images as a model takes them: float32 ``[b, 1, S, S]`` in [0, 1] on ``device``."""
        if not isinstance(indices, slice | torch.Tensor):
            indices = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        return self.images[indices].to(device).to(torch.float32).div_(255)

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """All images in their order, as ``batch`` gives them, so many at a time."""
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size))

    def subset(self, mask_or_indices: torch.Tensor | Sequence[int] | Sequence[bool]) -> ImageSet:
        """The images that a boolean mask ``[n]`` marks or that indices name, in their order."""
        index = torch.as_tensor(mask_or_indices, device="cpu")
        if index.dtype == torch.bool:
            if tuple(index.shape) != (len(self),):
                raise ValueError(f"the mask has the shape {tuple(index.shape)}, not [{len(self)}]")
            index = index.nonzero()[:, 0]
        index = index.to(torch.int64)
        paths = [self.paths[i] for i in index.tolist()]
        index = index.to(self.images.device)
        return ImageSet(self.images[index], self.labels[index.to(self.labels.device)], paths)

    def subsample(self, count: int) -> ImageSet:
        """Every k-th image, k = n // count, which leaves at least ``count``, or all if fewer."""
        return self.subset(range(0, len(self), max(1, len(self) // count)))

    @property
    def normal(self) -> ImageSet:
        """The normal images alone."""
        return self.subset(self.labels == 0)

    @classmethod
    def concatenate(cls, *sets: ImageSet) -> ImageSet:
        """All images of the sets, one set behind the other."""
        return cls(
            torch.cat([each.images for each in sets]),
            torch.cat([each.labels for each in sets]),
            [path for each in sets for path in each.paths],
            [problem for each in sets for problem in each.broken],
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the pixels: the same for the same images in the same order."""
        return hashlib.sha256(self.images.cpu().contiguous().numpy().data).hexdigest()

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with its images on ``device``; labels stay where they are."""
        return ImageSet(self.images.to(device), self.labels, self.paths, self.broken)


def load_images(
    records: Sequence[Record],
    size: int,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    skip_broken: bool = False,
) -> ImageSet:
    """Read and resize all images of a dataset, in the order of their records.

    Args:
        size: side of the images in pixels.
        workers: threads that decode; one per processor if None.
        on_progress: called with (images done, images in all) now and then, in this thread.
        skip_broken: list files that cannot be read in ``ImageSet.broken`` instead of raising.

    Raises:
        ImageReadError: after all files were tried: how many could not be read, and the first few.
        ValueError: ``size`` or ``workers`` is less than 1.

    >>> from squid_fast.data import find_records, write_digit_anatomy
    >>> table = write_digit_anatomy("digits", {"test": (2, 1)}, cell=8)
    >>> images = load_images(find_records(table), size=32)
    >>> images.images.shape, sorted(images.labels.tolist())
    (torch.Size([3, 1, 32, 32]), [0, 0, 1])
    """
    if size < 1:
        raise ValueError(f"size is {size}; the side of an image is at least 1 pixel")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; at least 1 thread is needed")
    total = len(records)
    images = np.zeros((total, 1, size, size), dtype=np.uint8)

    def decode(index: int) -> str | None:
        try:
            images[index, 0] = load_bytes(records[index].path, size)
        except ImageReadError as error:
            return str(error)
        return None

    problems: list[str | None] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for start in range(0, total, _CHUNK):
            problems += pool.map(decode, range(start, min(start + _CHUNK, total)))
            if on_progress is not None:
                on_progress(len(problems), total)
    broken = [
        (str(record.path), problem)
        for record, problem in zip(records, problems, strict=True)
        if problem is not None
    ]
    if broken and not skip_broken:
        shown = "; ".join(problem for _, problem in broken[:_SHOWN])
        more = f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise ImageReadError(f"{len(broken)} of {total} images could not be read: {shown}{more}")
    known = [UNKNOWN if record.label is None else record.label for record in records]
    labels = torch.tensor(known, dtype=torch.int64, device="cpu")
    everything = ImageSet(torch.from_numpy(images), labels, [str(r.path) for r in records])
    if not broken:
        return everything
    kept = everything.subset([problem is None for problem in problems])
    kept.broken = broken
    return kept
