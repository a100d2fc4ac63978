"""Training data that is not clean: unlabelled abnormal images among the normal ones."""

from __future__ import annotations

from pathlib import Path

import torch

from . import ImageSet


def contaminated(
    normal: ImageSet, contaminants: ImageSet, rate: float, seed: int = 0
) -> tuple[ImageSet, list[str]]:
    """The normal images and so many of the others that they are ``rate`` of the whole.

    Args:
        normal: all of them stay.
        contaminants: of any label; those that are taken count as normal, as an archive that nobody
            has looked through would have it. Drawn without replacement.
        rate: share of the result, in (0, 1): n / (n + normal images).
        seed: of the draw.

    Returns:
        The mixed set and the paths of what was mixed in.

    Raises:
        ValueError: a rate out of range, or too few images to mix in.
    """
    if not 0 < rate < 1:
        raise ValueError(f"the rate is {rate}; it must lie between 0 and 1, such as 0.1.")
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


def check_apart(contaminants: list[Path], held_out: list[Path]) -> None:
    """Raise where a file is both to be mixed in and in a set that judges.

    Raises:
        ValueError: the first such file, and how many there are.
    """
    judged = {path.resolve() for path in held_out}
    both = [path for path in contaminants if path.resolve() in judged]
    if both:
        raise ValueError(
            f"{len(both)} of the images to mix in are validation or test images too, the first "
            f"{both[0]}; a model must not be judged on what it has learned from."
        )
