"""A scorer as a file that runs where squid_fast is not installed: PyTorch's own, or ONNX.

Both take and return what ``Scorer.to_torch_export`` describes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .._version import __version__
from ..utils.arguments import check_kind
from ..utils.atomic import replacing
from ..utils.devices import without_autocast
from ..utils.extras import require
from ..utils.outputs import check_file
from .program import quiet
from .scorer import Scorer
from .scores import SCORES

OUTPUTS = ("raw", "z_score", "anomaly_score", "reconstruction")
METADATA_FILE = "squid_fast.json"  # among the extra files of a .pt2

_LARGEST_ONNX = 2**31  # bytes of a protobuf message
_NOTICE = (
    "Research software, not a medical device. A high score says that an image is unlike the normal "
    "images the model learned from. It is no diagnosis, and a low score does not make an image "
    "normal."
)


def write_export(scorer: Scorer, path: str | Path) -> None:
    """Write the scorer as a graph: ``.onnx``, or ``.pt2``, which ``torch.export.load`` reads.

    Score, threshold, image size and more stand in the properties of the ONNX model, or as JSON in
    the extra file ``METADATA_FILE`` of the ``.pt2``. The file appears whole or not at all.

    Raises:
        ValueError: another suffix, a scorer that cannot be exported (see
            ``Scorer.to_torch_export``), or a model too large for ONNX.
        ImportError: the "export" extra is missing, which ONNX needs.
        OSError: the file cannot be written.
    """
    check_kind("scorer", scorer, Scorer)
    check_export(path)
    path = Path(path)
    with replacing(path) as file:
        program = scorer.to_torch_export()
        if path.suffix == ".onnx":
            file.write(_onnx(program, _metadata(scorer)))
        else:
            facts = json.dumps(_metadata(scorer), indent=2)
            torch.export.save(program, file, extra_files={METADATA_FILE: facts})


def check_export(path: str | Path) -> None:
    """Raise what ``write_export`` does of a path alone, before a model is loaded."""
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(
            f"{path} ends in {path.suffix!r}; .onnx or .pt2 says which kind of graph to write."
        )
    if path.suffix == ".onnx":
        require("onnx", "export")
        require("onnxscript", "export")
    check_file(path)


def _metadata(scorer: Scorer) -> dict[str, str]:
    """What somebody who has nothing but the file needs to know of it."""
    side, known = scorer.image_size, scorer.calibration
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
    held = (*program.state_dict.values(), *program.constants.values())
    size = sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))
    if size >= _LARGEST_ONNX:
        raise ValueError(
            f"the weights take {size / 1e9:.1f} GB, but an ONNX file holds at most "
            f"{_LARGEST_ONNX / 1e9:.1f} GB; .pt2 has no such limit."
        )
    with quiet(), without_autocast(torch.device("cpu")):
        found = torch.onnx.export(
            program, input_names=["images"], output_names=list(OUTPUTS), dynamo=True, verbose=False
        )
    assert found is not None
    model = found.model_proto
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]  # calls it by another name, and runtimes find it out for themselves
    for key, text in metadata.items():
        model.metadata_props.add(key=key, value=text)
    model.producer_name, model.producer_version = "squid_fast", __version__
    model.doc_string = f"SQUID anomaly scores ({metadata['score']}). {_NOTICE}"
    return model.SerializeToString()
