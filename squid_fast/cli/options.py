"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.devices import Precision, ScoringPrecision

Data = Annotated[Path, typer.Option("--data", help="Folder or table of images.")]
Layout = Annotated[str, typer.Option(help="How the data is laid out; found out unless named.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")]
TrainingPrecision = Annotated[Precision, typer.Option(help="auto: bf16 where computed in.")]
PrecisionName = Annotated[
    ScoringPrecision, typer.Option(help="auto: the fastest that ranks as float32 does.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Of PyTorch on a CPU; unless given, the fastest by timing."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Inputs = Annotated[list[str] | None, typer.Argument(help="Files, folders and globs.")]
FileList = Annotated[
    str | None,
    typer.Option("--list", help="File of names, or CSV with the column image_path; - is stdin."),
]
Root = Annotated[
    Path | None, typer.Option(help="Folder that the names in --list lie in; else the list's own.")
]
Mnist = Annotated[Path | None, typer.Option(help="MNIST IDX files; else bundled digits.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that read files.")]
Timeout = Annotated[float, typer.Option(help="Seconds that reading a file may take.")]
Rate = Annotated[float, typer.Option(help="Share of normal images that may be flagged.")]
