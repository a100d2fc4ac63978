"""DigitAnatomy, the synthetic data of the SQUID paper (CVPR 2023, section 4).

A grid of 3 x 3 handwritten digits, 1 to 9 in order, stands for the recurring structure of a
radiograph. What breaks the order is an anomaly, whose place is known exactly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..images import ImageSet
from .handwriting import SPLITS, bundled_digits, load_mnist, split_members

KINDS = ("missing", "swapped", "flipped", "foreign")

SCALE = (0.6, 1.3)
"""Range of a digit's size; at 1 a drawing's frame fills its cell."""

# Digits that may be mirrored, and how: (digit, left-right, upside-down). What is missing here would
# still pass for the same digit: 1 and 8 either way, 3 upside-down, 4 either way (open-topped fours
# are their own mirror image; a nearest-neighbour classifier takes more than half of the mirrored
# ones for a 4). 6 and 9 upside-down look like each other rather than mirrored.
_FLIPS = (
    (2, True, False), (2, False, True), (3, True, False), (5, True, False), (5, False, True),
    (6, True, False), (7, True, False), (7, False, True), (9, True, False),
)  # fmt: skip
_GRIDS_AT_ONCE = 256  # keeps the float cells of a chunk within the cache


@dataclass
class DigitGrids:
    """Grids with their ground truth.

    Attributes:
        images: uint8 ``[n, 1, S, S]``, S = 3 cells.
        labels: int64 ``[n]``, 0 normal, 1 anomalous.
        kinds: "normal" or one of ``KINDS`` for each grid.
        masks: bool ``[n, 1, S, S]``, True in the whole of every affected cell.

    >>> grids = DigitAnatomy(cell=16).anomalous(2, kinds=["missing", "swapped"])
    >>> grids.kinds, grids.labels.tolist()
    (['missing', 'swapped'], [1, 1])
    >>> (grids.masks.flatten(1).sum(1) // 16**2).tolist()  # affected cells
    [1, 2]
    """

    images: torch.Tensor
    labels: torch.Tensor
    kinds: list[str]
    masks: torch.Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def as_image_set(self) -> ImageSet:
        """The grids as an ``ImageSet``, for training and evaluation; paths are ``kind/number``."""
        paths = [f"{kind}/{number:05d}" for number, kind in enumerate(self.kinds)]
        return ImageSet(self.images, self.labels, paths)


@dataclass
class _Plan:
    """What to draw in each cell; every tensor is ``[n, 9]``, cells in reading order."""

    digit: torch.Tensor  # int64, 0..9
    drawing: torch.Tensor  # float32 in [0, 1), picks one of the digit's drawings
    scale: torch.Tensor  # float32
    mirror_x: torch.Tensor  # bool
    mirror_y: torch.Tensor  # bool
    empty: torch.Tensor  # bool
    affected: torch.Tensor  # bool


class DigitAnatomy:
    """Draws grids of digits, each a drawing of its own, scaled by 0.6 to 1.3.

    The drawings of each class are divided 60 : 20 : 20 into train, val and test, so that no drawing
    of a test grid was ever seen in training.

    Args:
        source: a folder with MNIST's IDX files (``train-images...`` or else ``t10k-images...``,
            with its labels, gzipped or not), or the file of the images; unless given, the 1,797
            digits of 8 x 8 pixels that come with scikit-learn.
        cell: side of one cell in pixels; grids are three times as wide.
        split: "train", "val" or "test".
        seed: fixes the division into splits, and the grids that calls without a seed draw.

    Attributes:
        drawings: int64, the indices of this split's drawings in the source.

    Raises:
        DigitSourceError: the source is missing, no IDX file, or lacks a digit.
        ImportError: no source was given and scikit-learn is not installed.
        ValueError: ``cell`` is less than 4 or ``split`` is unknown.

    >>> digits = DigitAnatomy(cell=16, split="test")
    >>> normal, anomalous = digits.normal(2, seed=0), digits.anomalous(2, seed=0)
    >>> normal.images.shape, anomalous.kinds
    (torch.Size([2, 1, 48, 48]), ['missing', 'swapped'])
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | None = None,
        cell: int = 32,
        split: str = "train",
        seed: int = 0,
    ) -> None:
        if cell < 4:
            raise ValueError(f"cell is {cell}; a digit needs at least 4 pixels")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; {', '.join(SPLITS)} are there")
        images, classes = bundled_digits() if source is None else load_mnist(source)
        self.cell = cell
        self.split = split
        members = split_members(torch.from_numpy(classes), split, seed)
        self.drawings = torch.cat(members)
        self._count = torch.tensor([len(member) for member in members])
        self._start = self._count.cumsum(0) - self._count
        self._bank = _resized(torch.from_numpy(images)[self.drawings], cell)
        self._generator = torch.Generator().manual_seed(3 * seed + SPLITS.index(split))

    def normal(self, n: int, seed: int | torch.Generator | None = None) -> DigitGrids:
        """Draw n grids in order: those of the seed, or the next of this object's own sequence."""
        return self._render(self._plan(n, self._random(seed)), ["normal"] * n)

    def anomalous(
        self, n: int, seed: int | torch.Generator | None = None, kinds: Sequence[str] = KINDS
    ) -> DigitGrids:
        """Draw n grids with one anomaly each, the kinds in turn and so in equal shares.

        - ``missing``: one cell is empty.
        - ``swapped``: two cells have changed places.
        - ``flipped``: one digit is mirrored, left-right (2, 3, 5, 6, 7, 9) or upside-down
          (2, 5, 7). The others look like themselves when mirrored, or turn into another digit.
        - ``foreign``: one cell holds a wrong digit, 0 to 9 with equal chances.

        With the same seed, everything outside of the mask is as in ``normal``.

        Raises:
            ValueError: ``kinds`` is empty or names one that is not in ``KINDS``.
        """
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown or not kinds:
            raise ValueError(f"kinds is {tuple(kinds)}; choose among {', '.join(KINDS)}")
        generator = self._random(seed)
        plan = self._plan(n, generator)
        names = [kinds[i % len(kinds)] for i in range(n)]
        _spoil(plan, names, generator)
        return self._render(plan, names)

    def _random(self, seed: int | torch.Generator | None) -> torch.Generator:
        if seed is None:
            return self._generator
        return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def _plan(self, n: int, generator: torch.Generator) -> _Plan:
        if n < 0:
            raise ValueError(f"n is {n}; a number of grids is 0 or more")
        drawing = torch.rand(n, 9, generator=generator)
        low, high = SCALE
        scale = low + (high - low) * torch.rand(n, 9, generator=generator)
        digit = torch.arange(1, 10).expand(n, 9).clone()
        nowhere = [torch.zeros(n, 9, dtype=torch.bool) for _ in range(4)]
        return _Plan(digit, drawing, scale, *nowhere)

    def _render(self, plan: _Plan, kinds: list[str]) -> DigitGrids:
        n, side = len(kinds), 3 * self.cell
        images = torch.empty(n, 1, side, side, dtype=torch.uint8)
        count = self._count[plan.digit]
        within = (plan.drawing * count).long().clamp_(max=count - 1)
        index = self._start[plan.digit] + within
        for start in range(0, n, _GRIDS_AT_ONCE):
            part = slice(start, start + _GRIDS_AT_ONCE)
            ink = self._bank[index[part].flatten()].float()
            ink.mul_(~plan.empty[part].reshape(-1, 1, 1))
            scale = plan.scale[part].flatten()
            rows = _sampling(scale, plan.mirror_y[part].flatten(), self.cell)
            columns = _sampling(scale, plan.mirror_x[part].flatten(), self.cell)
            cells = rows @ ink @ columns.transpose(1, 2)
            images[part] = _assembled(cells.add_(0.5).clamp_(0, 255).to(torch.uint8))
        masks = plan.affected.reshape(-1, 1, 1).expand(-1, self.cell, self.cell)
        labels = torch.tensor([int(kind != "normal") for kind in kinds], dtype=torch.int64)
        return DigitGrids(images, labels, kinds, _assembled(masks))


def _spoil(plan: _Plan, kinds: list[str], generator: torch.Generator) -> None:
    """Put one anomaly of its kind into each grid of the plan."""
    n, grids = len(kinds), torch.arange(len(kinds))
    place = torch.randint(9, (n,), generator=generator)
    other = (place + torch.randint(1, 9, (n,), generator=generator)) % 9
    wrong = (place + 1 + torch.randint(1, 10, (n,), generator=generator)) % 10
    flip = torch.tensor(_FLIPS)[torch.randint(len(_FLIPS), (n,), generator=generator)]
    missing, swapped, flipped, foreign = (
        torch.tensor([i for i, name in enumerate(kinds) if name == kind], dtype=torch.int64)
        for kind in KINDS
    )
    place[flipped] = flip[flipped, 0] - 1

    plan.affected[grids, place] = True
    plan.empty[missing, place[missing]] = True
    plan.affected[swapped, other[swapped]] = True
    plan.digit[swapped, place[swapped]] = other[swapped] + 1
    plan.digit[swapped, other[swapped]] = place[swapped] + 1
    plan.mirror_x[flipped, place[flipped]] = flip[flipped, 1].bool()
    plan.mirror_y[flipped, place[flipped]] = flip[flipped, 2].bool()
    plan.digit[foreign, place[foreign]] = wrong[foreign]


def _sampling(scale: torch.Tensor, mirrored: torch.Tensor, cell: int) -> torch.Tensor:
    """Bilinear sampling along one axis as matrices [K, cell (to), cell (from)].

    Scaling about the middle and mirroring act on each axis alone, so a batch of affine samplings is
    two batched products: the same values as ``grid_sample`` with zeros outside, in half the time.
    """
    pixel = torch.arange(cell, dtype=torch.float32)
    middle = (cell - 1) / 2
    zoom = torch.where(mirrored, -1 / scale, 1 / scale)
    position = (pixel - middle) * zoom[:, None] + middle  # [K, cell]
    return (position[:, :, None] - pixel).abs_().neg_().add_(1).clamp_(min=0)


def _assembled(cells: torch.Tensor) -> torch.Tensor:
    """[n * 9, cell, cell] -> [n, 1, 3 cell, 3 cell]."""
    side = cells.shape[-1]
    grid = cells.reshape(-1, 3, 3, side, side).transpose(2, 3)
    return grid.reshape(-1, 1, 3 * side, 3 * side)


def _resized(drawings: torch.Tensor, cell: int) -> torch.Tensor:
    """uint8 [m, h, w] -> uint8 [m, cell, cell], antialiased."""
    resized = [
        F.interpolate(part[:, None].float(), (cell, cell), mode="bilinear", antialias=True)
        for part in torch.split(drawings, 4096)
    ]
    return torch.cat(resized)[:, 0].add_(0.5).clamp_(0, 255).to(torch.uint8)
