"""Options that several verbs share, the values that they take, and their former names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..utils.devices import Precision, ScoringPrecision
from .console import say

PresetName = Literal["zhanglab", "zhanglab_cpu", "chexpert", "digit_anatomy", "small"]
LayoutName = Literal[
    "auto", "authors", "archive", "medianomaly", "chexpert", "covidx", "table", "flat"
]
MethodName = Literal[
    "squid",
    "pca",
    "mahalanobis",
    "knn",
    "smoothness",
    "autoencoder",
    "memae",
    "pixel_inpainting",
]
ScoreName = Literal[
    "discriminator_instance",
    "discriminator_running",
    "discriminator_image",
    "reconstruction_error",
    "patch_error",
]

BundleFolder = Annotated[Path, typer.Argument(help="Folder of a trained model.")]
Data = Annotated[
    Path, typer.Option("--data", help="Folder of images, or CSV table with a column image_path.")
]
Layout = Annotated[
    LayoutName,
    typer.Option(help="Layout of the data; auto recognises it by folder and file names."),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device to compute on: cpu, cuda, or one GPU of several, such as cuda:1.",
        show_default="a GPU if there is one",
    ),
]
TrainingPrecision = Annotated[
    Precision,
    typer.Option(
        help="Number format to compute in; auto is bf16 where the hardware supports it, else "
        "float32."
    ),
]
PrecisionName = Annotated[
    ScoringPrecision,
    typer.Option(
        help="Number format to compute in; auto is the fastest that ranks images as float32 does."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of PyTorch threads on a CPU.", show_default="the fastest, by timing"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on standard output.")]
Inputs = Annotated[
    list[str] | None,
    typer.Argument(help="Image files, folders, or quoted patterns such as '*.dcm'."),
]
FileList = Annotated[
    str | None,
    typer.Option(
        "--list",
        help="Text file with one image file per line, or CSV table with a column image_path; "
        "- is standard input.",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(
        help="Folder that the files in --list lie in; files outside it are not read.",
        show_default="the folder of --list",
    ),
]
Mnist = Annotated[
    Path | None,
    typer.Option(
        help="Folder of MNIST's IDX files to take the digits from.",
        show_default="the digits of scikit-learn",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Number of processes that read files; 0 reads in the main process.",
        show_default="one for each core, at most 16",
    ),
]
Score = Annotated[
    ScoreName | None,
    typer.Option(
        help="Score to rank and flag images by.", show_default="the one chosen in training"
    ),
]
Timeout = Annotated[
    float, typer.Option(help="Longest time to read one file, in seconds; then it counts as broken.")
]
Rate = Annotated[
    float,
    typer.Option(
        help="Share of normal images that the threshold may flag, between 0 and 1; it is set on "
        "validation images."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of images scored at once.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continuation of an interrupted run with the same --out.")
]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]

_RENAMED = {
    "--averaging": "--ema-decay",
    "--batch": "--batch-size",
    "--graphs": "--cuda-graphs",
    "--no-graphs": "--no-cuda-graphs",
    "--rate": "--contamination-rate",
}


def current_name(word: str) -> str:
    """A word of the command line; the former name of an option becomes its present one.

    >>> current_name("--ema-decay=0.99")
    '--ema-decay=0.99'
    >>> current_name("--averaging=0.99")  # says on stderr that --averaging is deprecated
    '--ema-decay=0.99'
    """
    name, equals, value = word.partition("=")
    if name not in _RENAMED:
        return word
    say(f"{name} is deprecated; use {_RENAMED[name]}", "yellow")
    return _RENAMED[name] + equals + value
