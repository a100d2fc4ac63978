"""A frozen model with its score as a program of PyTorch, see ``Scorer.to_torch_export``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import ops
from .model import LOGITS, FrozenModel
from .scores import Calibration, raw_scores, z_score


def trace(model: FrozenModel, score: str, calibration: Calibration) -> ExportedProgram:
    """The program of a float32 model on the CPU and one of its calibrated scores."""
    side = model.image_size
    # A batch of 1 would be taken for a constant.
    images = torch.rand(2, 1, side, side, dtype=torch.float32, device="cpu")
    shapes = {"images": {0: Dim("batch", min=1)}}
    # With gradients the projections of the memory slots would not be used.
    with torch.no_grad():
        own = _Program(model, score, calibration).eval()
        program = torch.export.export(own, (images,), dynamic_shapes=shapes)
    with quiet():
        program = program.run_decompositions(ops.DECOMPOSITIONS)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of the machine that exports
    return program


class _Program(nn.Module):
    """What ``Scorer.score`` computes, in modules that can be traced."""

    def __init__(self, model: FrozenModel, score: str, calibration: Calibration) -> None:
        super().__init__()
        self.model = model.portable()
        self.name, self.calibration = score, calibration

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        names = [self.name] if self.name in LOGITS else []
        recon, errors, *logits = self.model(images, names)
        found = dict(zip(names, logits, strict=True))
        raw = raw_scores([self.name], found, errors, self.calibration)[self.name]
        own = self.calibration.scores[self.name]
        z = z_score(self.name, raw, own.mean, own.std)
        return raw, z, torch.sigmoid(z), recon


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what PyTorch tells its own developers while it exports."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx._internal.exporter", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
            # A constant of the neighbourhood attention: nobody outside, weight e^-inf.
            warnings.filterwarnings("ignore", "divide by zero encountered in log", RuntimeWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
