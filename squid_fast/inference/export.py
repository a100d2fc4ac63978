"""A scorer as a graph that runs where squid_fast is not installed: PyTorch's own, or ONNX.

The graph holds ATen operations (or those of ONNX) alone and takes any number of images:

- ``images``: float32 [B, 1, S, S] in [0, 1], B from 1 on;
- ``raw``, ``z_score``, ``anomaly_score``: float32 [B], as in ``Scores``;
- ``reconstruction``: float32 [B, 1, S, S].

Nobody in a graph can raise: an image with NaN or infinite pixels gets NaN for scores, those beside
it are not touched.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import ops
from .._version import __version__
from ..utils.atomic import replacing
from ..utils.devices import to_layout
from ..utils.extras import require
from .convolution import FoldedConv, cast
from .scorer import JUDGED
from .scores import SCORES

if TYPE_CHECKING:
    from .scorer import Scorer

OUTPUTS = ("raw", "z_score", "anomaly_score", "reconstruction")
METADATA_FILE = "squid_fast.json"  # among the extra files of a .pt2

_LARGEST_ONNX = 2**31  # bytes of a protobuf message
_NOTICE = (
    "Research software, not a medical device. A high score says that an image is unlike the normal "
    "images the model learned from. It is no diagnosis, and a low score does not make an image "
    "normal."
)


def to_torch_export(scorer: Scorer) -> ExportedProgram:
    """The scorer as a program of ATen operations; see ``Scorer.to_torch_export``."""
    if scorer.precision != "float32" or scorer.device.type != "cpu":
        raise ValueError(
            f"this scorer computes in {scorer.precision} on {scorer.device}, but a graph is made "
            "of float32 weights on the CPU: Scorer.load(bundle, precision='float32', device='cpu') "
            "has them."
        )
    scorer.z_score(scorer.score_name, torch.zeros(1))  # raises without a calibration
    side = scorer.image_size
    with torch.no_grad():  # with gradients the projections of the memory slots would not be used
        program = torch.export.export(
            _Graph(scorer).eval(),
            (torch.rand(2, 1, side, side),),  # 2: a size of 1 would be taken for one that stays
            dynamic_shapes={"images": {0: Dim("batch", min=1)}},
        )
    with _quiet():
        program = program.run_decompositions(ops.DECOMPOSITIONS)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of the machine that exports
    return program


def write_export(scorer: Scorer, path: str | Path) -> None:
    """Write the scorer as a graph: ``.onnx``, or ``.pt2``, which ``torch.export.load`` reads.

    The file explains itself: score, threshold, image size and more stand in the properties of the
    ONNX model, or as JSON in the extra file ``METADATA_FILE`` of the ``.pt2``. It appears whole
    or not at all.

    Raises:
        ValueError: another suffix, a scorer that cannot be exported (see
            ``Scorer.to_torch_export``), or a model too large for ONNX.
        ImportError: the "export" extra is missing, which ONNX needs.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(
            f"{path} ends in {path.suffix!r}; .onnx or .pt2 says which kind of graph to write."
        )
    if path.suffix == ".onnx":
        for module in ("onnx", "onnxscript"):
            require(module, "export")
    with replacing(path) as file:
        program = to_torch_export(scorer)
        if path.suffix == ".onnx":
            file.write(_onnx(program, _metadata(scorer)))
        else:
            facts = json.dumps(_metadata(scorer), indent=2)
            torch.export.save(program, file, extra_files={METADATA_FILE: facts})


class _Graph(nn.Module):
    """What ``Scorer.score`` computes, in modules that can be traced."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        own = copy.copy(scorer)
        plain: dict[int, object] = {
            id(conv): cast(conv, torch.float32, torch.contiguous_format, onednn=False)
            for conv in scorer._generator.modules()
            if isinstance(conv, FoldedConv)
        }
        self.generator = own._generator = copy.deepcopy(scorer._generator, plain)
        self.generator.layout, self.generator.least = torch.contiguous_format, 1
        judges = copy.deepcopy(scorer._discriminators).requires_grad_(False)
        self.discriminators = own._discriminators = to_layout(judges, torch.contiguous_format)
        self._scorer = own

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        name = self._scorer.score_name
        judged = (name,) if name in JUDGED else ()
        recon, errors, *logits = self._scorer._network(judged, images)
        known = dict(zip(judged, logits, strict=True))
        raw = self._scorer._derive((name,), known, errors)[name]
        z = self._scorer.z_score(name, raw)
        return raw, z, torch.sigmoid(z), recon


def _metadata(scorer: Scorer) -> dict[str, str]:
    """What somebody who has nothing but the file needs to know of it."""
    side = scorer.image_size
    known = scorer.calibration
    assert known is not None
    return {
        "notice": _NOTICE,
        "squid_fast_version": __version__,
        "scorer_fingerprint": scorer.fingerprint,
        "score": scorer.score_name,
        "score_meaning": SCORES[scorer.score_name][1],
        "image_size": str(side),
        "images": f"float32 [batch, 1, {side}, {side}] in [0, 1]: greyscale, MONOCHROME1 inverted, "
        "integers divided by their full range, resized with antialiased bilinear interpolation "
        "without regard to the aspect ratio",
        "raw": "float32 [batch], the score in its own unit",
        "z_score": "float32 [batch], standard deviations from the mean of normal training images; "
        "greater is less normal; rank by this one",
        "anomaly_score": "float32 [batch], sigmoid(z_score)",
        "reconstruction": f"float32 [batch, 1, {side}, {side}] in [0, 1]",
        "threshold": repr(scorer.threshold),
        "threshold_meaning": "an image is flagged when its z_score exceeds it",
        "threshold_images": known.threshold_images,
        "false_positive_rate": repr(scorer.false_positive_rate),
    }


def _onnx(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    """The program as an ONNX model."""
    held = (*program.state_dict.values(), *program.constants.values())
    size = sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))
    if size >= _LARGEST_ONNX:
        raise ValueError(
            f"the weights take {size / 1e9:.1f} GB, but an ONNX file holds at most "
            f"{_LARGEST_ONNX / 1e9:.1f} GB; .pt2 has no such limit."
        )
    with _quiet():
        found = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamo=True,
            verbose=False,
        )
    assert found is not None
    model = found.model_proto
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]  # calls it by another name, and runtimes find it out for themselves
    for item in metadata.items():
        model.metadata_props.add(key=item[0], value=item[1])
    model.producer_name, model.producer_version = "squid_fast", __version__
    model.doc_string = f"SQUID anomaly scores ({metadata['score']}). {_NOTICE}"
    return model.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what PyTorch has to say to its own developers."""
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
