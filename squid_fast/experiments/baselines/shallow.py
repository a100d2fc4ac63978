"""Shallow methods on few pixels: a deep model is only worth its cost where it beats them.

They are fitted by scikit-learn and kept as plain tensors. Each maps images to a distance and to a
normal image that stands for them.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import ImageSet
from ...utils.extras import require

SIDE = 32  # pixels that images are shrunk to
VARIANCE = 0.95  # share that the principal components explain
NEIGHBOURS = 5  # whose distances are averaged


class PixelMethod(nn.Module):
    """A method on vectors of D = SIDE * SIDE pixels, float64, whose state is in buffers."""

    score_name: ClassVar[str] = "distance"

    def __init__(self, **state: Tensor) -> None:
        super().__init__()
        for name, value in state.items():
            self.register_buffer(name, value.double())

    @classmethod
    def fit(cls, images: ImageSet) -> PixelMethod:
        """The method fitted to normal images."""
        vectors = pixels(images.batch(slice(0, len(images)))).numpy()
        return cls(**{k: torch.from_numpy(np.array(v)) for k, v in cls.estimate(vectors).items()})

    @staticmethod
    def estimate(vectors: np.ndarray) -> dict[str, np.ndarray]:
        """The state, from vectors [n, D]."""
        raise NotImplementedError

    def compare(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Distances [B] of vectors [B, D], and their normal counterparts [B, D]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B] of images [B, 1, S, S], greater for the less normal, and reconstructions."""
        distance, normal = self.compare(pixels(images))
        small = normal.float().view(-1, 1, SIDE, SIDE)
        return distance, F.interpolate(small, size=images.shape[-2:], mode="bilinear").clamp(0, 1)


class PcaResidual(PixelMethod):
    """Distance to the subspace of the principal components of normal images."""

    mean: Tensor  # [D]
    components: Tensor  # [components, D]

    @staticmethod
    def estimate(vectors: np.ndarray) -> dict[str, np.ndarray]:
        model = require("sklearn.decomposition", "train").PCA(VARIANCE, svd_solver="full")
        model.fit(vectors)
        return {"mean": model.mean_, "components": model.components_}

    def compare(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        normal = (vectors - self.mean) @ self.components.T @ self.components + self.mean
        return (vectors - normal).norm(dim=1), normal


class Mahalanobis(PixelMethod):
    """Mahalanobis distance to the mean of normal images (Ledoit and Wolf's covariance)."""

    mean: Tensor  # [D]
    precision: Tensor  # [D, D]

    @staticmethod
    def estimate(vectors: np.ndarray) -> dict[str, np.ndarray]:
        model = require("sklearn.covariance", "train").LedoitWolf().fit(vectors)
        return {"mean": model.location_, "precision": model.precision_}

    def compare(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        away = vectors - self.mean
        squared = ((away @ self.precision) * away).sum(dim=1)
        return squared.clamp_min(0).sqrt(), self.mean.expand_as(vectors)


class NearestNeighbours(PixelMethod):
    """Mean distance to the nearest normal images; the nearest is the counterpart."""

    examples: Tensor  # [n, D]

    @staticmethod
    def estimate(vectors: np.ndarray) -> dict[str, np.ndarray]:
        return {"examples": vectors}

    def compare(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        neighbors = require("sklearn.neighbors", "train").NearestNeighbors
        count = min(NEIGHBOURS, len(self.examples))
        model = neighbors(n_neighbors=count, algorithm="brute").fit(self.examples.cpu().numpy())
        distances, nearest = model.kneighbors(vectors.cpu().numpy())
        found = torch.from_numpy(distances.mean(axis=1)).to(vectors.device)
        return found, self.examples[torch.from_numpy(nearest[:, 0]).to(vectors.device)]


class Smoothness(PixelMethod):
    """How little neighbouring pixels differ, which is what the blur of an image alone tells.

    Shadows of pneumonia are smooth. The sign of the score uses that knowledge, so this is not a
    method without labels but a check of how hard a data set is. The counterpart is the image.
    """

    score_name = "smoothness"
    mean: Tensor  # [1], of normal images' roughness

    @staticmethod
    def estimate(vectors: np.ndarray) -> dict[str, np.ndarray]:
        return {"mean": roughness(torch.from_numpy(vectors)).mean(dim=0, keepdim=True).numpy()}

    def compare(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean - roughness(vectors), vectors


def roughness(vectors: Tensor) -> Tensor:
    """Log of the mean squared difference of neighbouring pixels [n], of vectors [n, D]."""
    images = vectors.view(-1, SIDE, SIDE)
    down, across = (images.diff(dim=axis).square().mean(dim=(1, 2)) for axis in (1, 2))
    return (down + across).clamp_min(1e-12).log()


def pixels(images: Tensor) -> Tensor:
    """Images [B, 1, S, S] as vectors [B, D], float64."""
    small = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return small.flatten(1).double()
