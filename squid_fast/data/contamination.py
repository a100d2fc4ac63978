"""Training data with unlabelled abnormal images among the normal ones."""

from __future__ import annotations

from pathlib import Path

import torch

from .images import ImageSet


def contaminated(
    normal: ImageSet, contaminants: ImageSet, rate: float, seed: int = 0
) -> tuple[ImageSet, list[str]]:
    """Mix contaminants into normal images so that they make up ``rate`` of the result.

    The contaminants, of any label, are drawn without replacement. In the result they are labelled
    normal, as in an archive that nobody has looked through. Their paths come with the result.

    Raises:
        ValueError: a rate outside (0, 1), or too few contaminants.

    >>> pixels = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)
    >>> images = ImageSet(pixels, torch.zeros(12).long(), [f"{i}.png" for i in range(12)])
    >>> mixed, paths = contaminated(images.subset(range(9)), images.subset([9, 10, 11]), rate=0.1)
    >>> len(mixed), len(paths)
    (10, 1)
    """
    check_contamination_rate(rate)
    count = round(rate / (1 - rate) * len(normal))
    if count > len(contaminants):
        most = len(contaminants) / (len(contaminants) + len(normal))
        raise ValueError(
            f"a rate of {rate:g} takes {count} images beside {len(normal)} normal ones, but there "
            f"are {len(contaminants)} to mix in; a rate of at most {int(1000 * most) / 1000} would "
            "fit."
        )
    order = torch.randperm(len(contaminants), generator=torch.Generator().manual_seed(seed))
    taken = contaminants.subset(order[:count])
    taken.labels.zero_()
    return ImageSet.concatenate(normal, taken), taken.paths


def check_contamination_rate(rate: float) -> None:
    """Raise ValueError for a share of contaminants outside (0, 1)."""
    if not 0 < rate < 1:
        raise ValueError(f"the rate is {rate}; it must lie between 0 and 1, such as 0.1.")


def check_apart(contaminants: list[Path], held_out: list[Path]) -> None:
    """Raise ValueError if a contaminant is also a validation or test image."""
    evaluated = {path.resolve() for path in held_out}
    if both := [path for path in contaminants if path.resolve() in evaluated]:
        raise ValueError(
            f"{len(both)} of the images to mix in are validation or test images too, the first "
            f"{both[0]}; a model must not be evaluated on images that it was trained on."
        )
