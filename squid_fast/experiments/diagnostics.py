"""How a model uses its memories and how its reconstructions develop, as figures and pictures.

They illustrate the paper's argument for queues (section 3.2): the slots of a queue are features of
real images, whereas learned slots need not be similar to any.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..data import ImageSet
from ..modules import SQUID, MemoryMatrix, MemoryQueue
from ..utils.atomic import write_json
from ..utils.extras import require

_IMAGES = 64
_SHOWN = 2  # reconstructions of each label
_COLUMNS = 8  # validations shown in the picture, evenly spaced
Memory = MemoryQueue | MemoryMatrix


@dataclass(frozen=True)
class MemoryUse:
    """How a set of images uses one memory with M slots at each of N places.

    Attributes:
        kind: "queue" or "matrix".
        hits: int64 [N, M], the number of images for which the shrinkage kept a slot.
        similarity: float32 [N, M], the cosine similarity of a slot and the feature nearest to it.

    >>> use = MemoryUse("queue", np.array([[3, 3, 0, 0]]), np.zeros((1, 4), np.float32))
    >>> use.dead_share, use.effective_slots
    (0.5, [2.0])
    """

    kind: str
    hits: np.ndarray
    similarity: np.ndarray

    @property
    def dead_share(self) -> float:
        """Share of the slots that no image used."""
        return float((self.hits == 0).mean())

    @property
    def effective_slots(self) -> list[float]:
        """Exponential of the entropy of the hits at each place, equal to M if all are hit alike."""
        shares = self.hits / np.maximum(self.hits.sum(axis=1, keepdims=True), 1)
        logs = np.log(np.where(shares > 0, shares, 1))
        return [float(x) for x in np.exp(-(shares * logs).sum(axis=1))]

    def figures(self) -> dict[str, Any]:
        """The figures as JSON can hold them."""
        places, slots = self.hits.shape
        return {
            "kind": self.kind, "places": places, "slots": slots, "dead_share": self.dead_share,
            "effective_slots": self.effective_slots, "similarity": float(self.similarity.mean()),
        }  # fmt: skip


@torch.no_grad()
def memory_use(model: SQUID, images: ImageSet) -> dict[str, MemoryUse]:
    """The use of each memory, by module name, on about 64 images; the model is not changed."""
    device = next(model.parameters()).device
    own = copy.deepcopy(model).float().eval()
    memories = {name: m for name, m in own.named_modules() if isinstance(m, Memory)}
    queries: dict[nn.Module, Tensor] = {}
    for memory in memories.values():
        memory.register_forward_pre_hook(
            lambda module, given: queries.__setitem__(module, given[0].detach().float())
        )
    own(images.subsample(_IMAGES).batch(slice(None), device), teacher=False)
    return {name: _use(m, queries[m]) for name, m in memories.items() if m in queries}


def _use(memory: Memory, query: Tensor) -> MemoryUse:
    slots = memory.slots  # [N, M, C]
    if memory.single:  # one memory for all places
        query = query.reshape(-1, 1, query.shape[-1])
    weights = torch.einsum("bnc,nmc->bnm", query, slots)
    if isinstance(memory.shrink_thres, int) and memory.shrink_thres > 0:
        weights = ops.gumbel_shrinkage(weights, memory.shrink_thres)
    elif memory.shrink_thres > 0:
        weights = ops.hard_shrinkage(weights, memory.shrink_thres)
    hits = (weights != 0).sum(dim=0)
    unit = F.normalize(query, dim=2), F.normalize(slots, dim=2)
    cosine = torch.einsum("bnc,nmc->bnm", *unit).amax(dim=0)
    kind = "queue" if isinstance(memory, MemoryQueue) else "matrix"
    return MemoryUse(kind, hits.cpu().numpy(), cosine.cpu().numpy())


def draw_memory(uses: dict[str, MemoryUse], path: Path) -> None:
    """Draw a row for each memory: the hits of its slots, sorted at each place, and similarities.

    Raises:
        ValueError: ``uses`` is empty.
    """
    if not uses:
        raise ValueError("the model has no memories, so there is nothing to draw.")
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(10, 2.6 * len(uses)), layout="constrained"
    )
    axes = figure.subplots(len(uses), 2, squeeze=False, width_ratios=[3, 2])
    for (name, use), (left, right) in zip(uses.items(), axes, strict=True):
        ranked = -np.sort(-use.hits, axis=1)
        shown = left.imshow(ranked, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
        figure.colorbar(shown, ax=left, label="images that use the slot")
        left.set(xlabel="slots, most used first", ylabel="place")
        left.set_yticks(range(len(ranked)))
        left.set_title(
            f"{name} ({use.kind}): {use.dead_share:.0%} of the slots unused, "
            f"{np.mean(use.effective_slots):.0f} of {use.hits.shape[1]} effective",
            fontsize=9, loc="left",
        )  # fmt: skip
        right.hist(use.similarity.ravel(), bins=40, range=(-1, 1), color="C0")
        right.axvline(float(use.similarity.mean()), color="C1", linewidth=1.5)
        right.set(xlabel="cosine similarity of a slot and the nearest feature", ylabel="slots")
        right.set_title(f"mean {use.similarity.mean():.2f}", fontsize=9, loc="left")
        right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


class TrainingSnapshots:
    """Pictures of a training run under ``out/pictures``, drawn at every validation.

    ``reconstructions.png`` shows reconstructions of the same images over time; ``memory.png`` and
    ``memory.json`` show how the memories are used now. A resumed run adds to what is there. Of the
    validation ``images``, a few of each label are shown.
    """

    def __init__(self, out: Path, images: ImageSet) -> None:
        require("matplotlib.figure", "train")  # rather now than after the first epochs
        self.folder = out / "pictures"
        self.images = images
        kinds = [images.labels == label for label in sorted(set(images.labels.tolist()))]
        chosen = [images.subset(kind).subsample(_SHOWN) for kind in kinds]
        self.shown = ImageSet.concatenate(
            *(some.subset(range(len(some))[:_SHOWN]) for some in chosen)
        )

    def add(self, model: SQUID, epoch: int) -> dict[str, float]:
        """Draw the model after an epoch, counted from 0, and return figures for the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "reconstructions.npz"
        strips = dict(np.load(path)) if path.exists() else {}
        strips = {key: strip for key, strip in strips.items() if int(key) <= epoch}
        strips[f"{epoch + 1:05d}"] = self._reconstruct(model)
        np.savez_compressed(path, **strips)
        self._draw(strips)
        uses = memory_use(model, self.images)
        if not uses:
            return {}
        draw_memory(uses, self.folder / "memory.png")
        write_json({name: use.figures() for name, use in uses.items()}, self.folder / "memory.json")
        found = {}
        for kind in sorted({use.kind for use in uses.values()}, reverse=True):  # queues first
            own = [use for use in uses.values() if use.kind == kind]
            found[f"memory/dead_share_{kind}"] = float(np.mean([u.dead_share for u in own]))
            found[f"memory/similarity_{kind}"] = float(np.mean([u.similarity.mean() for u in own]))
        return found

    @torch.no_grad()
    def _reconstruct(self, model: SQUID) -> np.ndarray:
        """Reconstructions of the images that are shown, uint8 [images, S, S]."""
        own = copy.deepcopy(model).float().eval()
        batch = self.shown.batch(slice(None), next(own.parameters()).device)
        recon = own(batch, teacher=False)["recon"]
        return np.asarray((recon[:, 0] * 255).round().byte().cpu().numpy())

    def _draw(self, strips: dict[str, np.ndarray]) -> None:
        keys = sorted(strips)
        keys = [keys[i] for i in np.unique(np.linspace(0, len(keys) - 1, _COLUMNS).astype(int))]
        originals = self.shown.images[:, 0].numpy()
        rows, columns = len(originals), len(keys) + 2
        figure = require("matplotlib.figure", "train").Figure(
            figsize=(1.5 * columns, 1.6 * rows + 0.4), layout="constrained"
        )
        axes = figure.subplots(rows, columns, squeeze=False)
        titles = ["image", *(f"epoch {int(k)}" for k in keys), "last - image"]
        names = {0: "normal", 1: "anomalous"}
        for row, image in enumerate(originals):
            pictures = [image, *(strips[k][row] for k in keys)]
            for axis, picture in zip(axes[row, :-1], pictures, strict=True):
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            difference = pictures[-1].astype(float) - image
            axes[row, -1].imshow(difference, cmap="RdBu_r", vmin=-128, vmax=128)
            label = names.get(int(self.shown.labels[row]), "unlabelled")
            axes[row, 0].set_ylabel(label, fontsize=9)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=9)
        for axis in axes.ravel():
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        figure.savefig(self.folder / "reconstructions.png", dpi=110)
