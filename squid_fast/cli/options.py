"""Options that several verbs share, the values that they take, and their former names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from ..data import LAYOUTS
from ..experiments.baselines import METHODS
from ..inference.scores import SCORES
from ..presets import PRESETS
from ..utils import devices
from .console import say

_LAYOUTS = ("auto", *LAYOUTS)
_METHODS = ("squid", *METHODS)
_OF_BASELINES = {kind.score_name for kind, _ in METHODS.values()}
_SCORES = (*SCORES, *sorted(_OF_BASELINES - SCORES.keys()))

if TYPE_CHECKING:  # a type checker takes no Literal whose values are computed
    PresetName = str
    LayoutName = str
    MethodName = str
    ScoreName = str
    AnyScoreName = str
else:
    PresetName = Literal[tuple(PRESETS)]
    LayoutName = Literal[_LAYOUTS]
    MethodName = Literal[_METHODS]
    ScoreName = Literal[tuple(SCORES)]
    AnyScoreName = Literal[_SCORES]


def score_option(
    names: Iterable[str], default: str | bool, purpose: str = "to rank and flag images by"
) -> Any:
    """The option ``--score``; it has too many names for the column of the option itself."""
    text = f"Score {purpose}: {', '.join(names)}."
    return Option(metavar="<name>", help=text, show_default=default)


BundleFolder = Annotated[Path, Argument(help="Folder of a trained model.")]
Data = Annotated[
    Path, Option("--data", help="Folder of images, or CSV table with a column image_path.")
]
Preset = Annotated[PresetName, Option(help="Network and training settings.")]
Layout = Annotated[LayoutName, Option(help="Layout of the data; auto recognises it.")]
Device = Annotated[
    str | None,
    Option(help="Device, such as cpu, cuda or cuda:1.", show_default="a GPU if there is one"),
]
TrainingPrecision = Annotated[
    devices.Precision, Option(help="Number format; auto is bf16 where the hardware computes in it.")
]
Precision = Annotated[
    devices.ScoringPrecision,
    Option(help="Number format; auto is the fastest that ranks as float32 does."),
]
Backend = Annotated[
    devices.Backend,
    Option(help="What runs the network; compile takes a minute at every new batch size."),
]
Threads = Annotated[
    int | None, Option(min=1, help="Number of CPU threads.", show_default="the fastest, by timing")
]
Json = Annotated[bool, Option("--json", help="Results as JSON on standard output.")]
Inputs = Annotated[
    list[str] | None, Argument(help="Image files, folders, or quoted patterns such as '*.dcm'.")
]
FileList = Annotated[
    str | None,
    Option(
        "--list",
        help="Text file with one image file per line, or CSV table with a column image_path; "
        "- is standard input.",
    ),
]
Root = Annotated[
    Path | None,
    Option(
        help="Folder that the files in --list lie in; files outside it are not read.",
        show_default="the folder of --list",
    ),
]
Mnist = Annotated[
    Path | None,
    Option(help="Folder of MNIST's IDX files.", show_default="the digits of scikit-learn"),
]
Workers = Annotated[
    int | None,
    Option(
        min=0,
        help="Number of processes that read files; 0 reads in the main process.",
        show_default="one for each core, at most 16",
    ),
]
ExportedScore = Annotated[
    ScoreName | None, score_option(SCORES, "the one chosen in training", "that the graph returns")
]
AnyScore = Annotated[AnyScoreName | None, score_option(_SCORES, "the one chosen in training")]
Timeout = Annotated[
    float, Option(help="Longest time to read one file, in seconds; then it counts as broken.")
]
Rate = Annotated[
    float, Option(help="Share of normal validation images that may be flagged, between 0 and 1.")
]
BatchSize = Annotated[int, Option(min=1, help="Number of images scored at once.")]
Resume = Annotated[
    bool, Option("--resume", help="Continuation of an interrupted run with the same --out.")
]
Seed = Annotated[int, Option(help="Seed of all random numbers.")]

_FILES_OF_MODELS = (
    "model.safetensors", "discriminator.safetensors", "config.json", "calibration.json",
    "checkpoint.pt", "metrics.csv",
)  # fmt: skip


def model_files(bundle: Path | None) -> list[Path]:
    """The files of a model's folder, which no result may replace."""
    return [] if bundle is None else [bundle / name for name in _FILES_OF_MODELS]


_RENAMED = {
    "--averaging": "--ema-decay",
    "--batch": "--batch-size",
    "--graphs": "--cuda-graphs",
    "--no-graphs": "--no-cuda-graphs",
    "--rate": "--contamination-rate",
}


def current_name(word: str) -> str:
    """A word of the command line; the former name of an option becomes its present one.

    >>> current_name("--averaging=0.99")  # says on stderr that --averaging is deprecated
    '--ema-decay=0.99'
    """
    name, equals, value = word.partition("=")
    if name not in _RENAMED:
        return word
    say(f"{name} is deprecated; use {_RENAMED[name]}", "yellow")
    return _RENAMED[name] + equals + value
