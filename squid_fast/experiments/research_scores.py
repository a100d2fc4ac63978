"""Scores for research, beside those of a ``Scorer``: of teacher and memories, and combinations.

They need parts of the model that a ``Scorer`` drops. All are greater for less normal images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..data import ImageSet
from ..inference.scores import PAPER_SCORE
from ..metrics import Evaluation, evaluate
from ..modules import SQUID, MemoryQueue
from ..utils.devices import Precision, choose_device, choose_layout, choose_precision, to_layout
from ..utils.tf32 import tf32

OTHER_SCORES = {
    "memory_distance": "how far a patch's features lie from the nearest slot of their queue: "
    "1 - cosine similarity, mean over the patches",
    "teacher_difference": "mean squared difference of the student's and the teacher's "
    "reconstruction",
}

COMBINATIONS = {
    "combined_discriminator": (PAPER_SCORE, "discriminator_image"),
    "combined_errors": (PAPER_SCORE, "discriminator_image", "patch_error"),
}
"""Means of the z-scores of several scores."""

_BATCH = 16


@torch.inference_mode()
def other_scores(
    model: SQUID,
    images: ImageSet,
    precision: Precision = "auto",
    device: str | torch.device | None = None,
) -> dict[str, Tensor]:
    """Those of ``OTHER_SCORES`` that the model has, [n] each, float32 on the CPU.

    A model without a teacher gives no ``teacher_difference``, one without a memory queue no
    ``memory_distance``. The model is not changed.
    """
    where = choose_device(device)
    bf16 = choose_precision(precision, where) == "bf16"
    layout = choose_layout(model.config["features_root"])
    model = to_layout(copy.deepcopy(model).eval().to(where), layout)
    queue = next((m for m in model.modules() if isinstance(m, MemoryQueue)), None)
    asked: list[Tensor] = []
    if queue is not None:
        queue.register_forward_pre_hook(lambda module, given: asked.append(given[0]))
    parts: dict[str, list[Tensor]] = {name: [] for name in OTHER_SCORES}
    for start in range(0, len(images), _BATCH):
        batch = images.batch(slice(start, start + _BATCH), where).to(memory_format=layout)
        with tf32(False), torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            outputs = model(batch)
        recon, teacher = outputs["recon"], outputs["teacher_recon"]
        if teacher is not None:
            squared = (recon.float() - teacher.float()).square()
            parts["teacher_difference"].append(squared.mean(dim=(1, 2, 3)).cpu())
        if queue is not None:
            unit = F.normalize(asked.pop().float(), dim=2), F.normalize(queue.slots, dim=2)
            nearest = torch.einsum("bnc,nmc->bnm", *unit).amax(dim=2)
            parts["memory_distance"].append((1 - nearest.mean(dim=1)).cpu())
    return {name: torch.cat(values) for name, values in parts.items() if values}


def evaluate_others(
    model: SQUID,
    images: ImageSet,
    z_scores: Mapping[str, NDArray[np.float32]],
    precision: Precision = "auto",
    device: str | torch.device | None = None,
) -> tuple[dict[str, Evaluation], dict[str, NDArray[np.float32]]]:
    """Figures of ``other_scores`` and ``COMBINATIONS`` on labelled images, and their values [n].

    Not calibrated, they have no thresholds. ``z_scores`` are those of ``Scorer.evaluate``.

    Raises:
        ValueError: images of unknown label or of one class only.
    """
    values = {k: v.numpy() for k, v in other_scores(model, images, precision, device).items()}
    for name, parts in COMBINATIONS.items():
        if z_scores.keys() >= set(parts):
            values[name] = np.mean([z_scores[part] for part in parts], axis=0)
    labels = images.labels.numpy()
    return {k: evaluate(labels, v, score_name=k) for k, v in values.items()}, values
