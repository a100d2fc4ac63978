"""The verbs that score: screen, pack, bench, export."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..experiments.baselines import load_scorer
from ..experiments.benchmark import Benchmark, random_bundle
from ..inference import Scorer, check_hardware
from ..inference.bundle import load_bundle
from ..inference.export import write_export
from ..presets import preset as find_preset
from ..screening import check_folder, check_output, read_list, screen_to_table, write_report
from ..screening import pack as pack_files
from ..screening.reading.pool import TIMEOUT
from ..utils.atomic import write_json
from ..utils.devices import choose_device
from .console import bench_table, print_json, print_table, progress_bar, say, stop_on_signals
from .options import Device, FileList, Inputs, Json, PrecisionName, Root, Timeout, Workers


def screen(
    bundle: Annotated[Path, typer.Argument(help="Trained bundle.")],
    out: Annotated[Path, typer.Option(help="Table: .parquet, .csv or .jsonl.")],
    paths: Inputs = None,
    listed: FileList = None,
    root: Root = None,
    report: Annotated[Path | None, typer.Option(help="HTML report.")] = None,
    summary: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    score: Annotated[str | None, typer.Option(help="Another score than the bundle's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    workers: Workers = None,
    timeout: Timeout = TIMEOUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of --out.")] = False,
    device: Device = None,
    precision: PrecisionName = "auto",
    as_json: Json = False,
) -> None:
    """Score files: one row for each, errors included; Ctrl-C keeps the rows, --resume goes on."""
    inputs = _inputs(paths, listed, root)
    check_output(out, resume)
    for path in (report, summary):
        if path is not None:
            check_folder(path)
    scorer = load_scorer(bundle, score, precision, device)
    started = time.perf_counter()
    with progress_bar("screening") as advance, stop_on_signals() as should_stop:
        screened = screen_to_table(
            scorer,
            inputs,
            out,
            resume=resume,
            batch_size=batch_size,
            workers=workers,
            timeout=timeout,
            on_progress=advance,
            should_stop=should_stop,
            say=say,
        )
    if screened is None:
        raise typer.Exit(130)
    seconds = time.perf_counter() - started
    if report is not None:
        write_report(
            report,
            scorer,
            screened,
            inputs=[*(paths or []), *([listed] if listed else [])],
            model_name=bundle.name,
            results=out,
            reference_z=scorer.reference_z,
        )
    figures = {**screened.as_dict(), "seconds": round(seconds, 2), "out": str(out)}
    if summary is not None:
        write_json(figures, summary)
    if as_json:
        print_json(figures)
    say(
        f"{screened.count} files in {seconds:.1f} s: {screened.flagged} flagged, "
        f"{screened.errors} with errors\ntable: {out}" + (f"\nreport: {report}" if report else "")
    )


def pack(
    out: Annotated[Path, typer.Option(help="Folder for the packed images.")],
    paths: Inputs = None,
    listed: FileList = None,
    root: Root = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels per side.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Trained bundle, for its size.")] = None,
    workers: Workers = None,
    timeout: Timeout = TIMEOUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the shards in --out.")] = (
        False
    ),
    as_json: Json = False,
) -> None:
    """Decode files once into Arrow shards, which screen faster and as often as needed."""
    inputs = _inputs(paths, listed, root)
    side = size if bundle is None else load_bundle(bundle).model.image_size
    if side is None or None not in (size, bundle):
        raise ValueError("give either --size or the --bundle that the images are packed for")
    started = time.perf_counter()
    with progress_bar("packing") as advance:
        packed = pack_files(
            inputs,
            out,
            side,
            resume=resume,
            on_progress=advance,
            workers=workers,
            timeout=timeout,
        )
    seconds = round(time.perf_counter() - started, 2)
    if as_json:
        print_json({**dataclasses.asdict(packed), "seconds": seconds, "out": str(out)})
    say(
        f"{packed.files} files in {seconds:.1f} s: {packed.errors} with errors, "
        f"{packed.bytes / 1e6:.1f} MB in {packed.shards} shards\nfolder: {out}"
    )


def export(
    bundle: Annotated[Path, typer.Argument(help="Trained bundle.")],
    out: Annotated[Path, typer.Option(help="File: .onnx, or .pt2 of PyTorch.")],
    score: Annotated[str | None, typer.Option(help="Another score than the bundle's.")] = None,
) -> None:
    """Write the scorer as a graph in float32 that runs without squid-fast: ONNX or PyTorch's."""
    check_folder(out)
    write_export(Scorer.load(bundle, score, "float32", "cpu"), out)
    say(f"written: {out}, {out.stat().st_size / 1e6:.1f} MB")


def bench(
    bundle: Annotated[
        Path | None, typer.Option(help="Trained bundle; else random weights, not in int8.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Model, where there is no bundle.")] = "zhanglab",
    data: Annotated[Path | None, typer.Option(help="Folder of images; else they are made up.")] = (
        None
    ),
    batch: Annotated[int, typer.Option(min=1, help="Images scored at once.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Times each way is timed.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="Of a run over files, about.")] = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    device: Device = None,
    precision: PrecisionName = "auto",
    as_json: Json = False,
) -> None:
    """How fast this machine scores, beside the published way; takes a minute or two."""
    if out is not None:
        check_folder(out)
    if threads is not None:
        torch.set_num_threads(threads)
    where = choose_device(device)
    check_hardware(precision, where)
    measured = load_bundle(bundle) if bundle else random_bundle(find_preset(preset))
    benchmark = Benchmark(measured, where, precision, batch, rounds, seconds, data)
    about = {"model": str(bundle or preset), "data": str(data) if data else None}
    figures = about | benchmark.run(progress=progress_bar)
    if out is not None:
        write_json(figures, out)
    if as_json:
        print_json(figures)
    else:
        print_table(bench_table(figures))


def _inputs(paths: list[str] | None, listed: str | None, root: Path | None) -> list[str]:
    """What is to be read: the names on the command line, then those in the list."""
    if not paths and listed is None:
        raise ValueError("nothing to read; name files, folders or globs, or a --list of files")
    if root is not None and listed is None:
        raise ValueError(f"--root {root} belongs to a --list, which is missing")
    return [*(paths or []), *(read_list(listed, root) if listed is not None else [])]
