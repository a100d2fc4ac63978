"""The verbs that score: screen, pack, bench, export."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from typer import Option

from ..data.listing import counted
from ..experiments.baselines import load_scorer
from ..experiments.benchmark import Benchmark, random_bundle
from ..inference import Scorer, check_hardware
from ..inference.bundle import load_bundle
from ..inference.export import check_export, write_export
from ..presets import preset as find_preset
from ..screening import check_output, check_outputs, read_list, screen_to_table, write_report
from ..screening import pack as pack_files
from ..screening.reading.pool import TIMEOUT
from ..utils.atomic import write_json
from ..utils.devices import choose_device
from ..utils.extras import require
from ..utils.outputs import check_distinct, check_file, check_folder
from ..utils.text import utf8_text
from . import options
from .console import print_json, print_table, progress_bar, say, stop_on_signals
from .tables import bench_table


def screen(
    bundle: options.BundleFolder,
    out: Annotated[Path, Option(help="Table of results: .parquet, .csv or .jsonl.")],
    paths: options.Inputs = None,
    listed: options.FileList = None,
    root: options.Root = None,
    report: Annotated[Path | None, Option(help="HTML file for a report.")] = None,
    summary: Annotated[
        Path | None, Option(help="JSON file for the numbers of files, flags and errors.")
    ] = None,
    score: options.AnyScore = None,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = None,
    timeout: options.Timeout = TIMEOUT,
    resume: options.Resume = False,
    device: options.Device = None,
    precision: options.Precision = "auto",
    backend: options.Backend = "eager",
    as_json: options.Json = False,
) -> None:
    """Score image files by how unusual they are.

    Reads PNG, JPEG, TIFF, DICOM and packed images. Writes a table with one row per file, in which
    files that cannot be read have an error in place of a score. Ctrl-C keeps the rows that are
    done.

    Example: squid-fast screen runs/zhang archive/ --out results.csv --report report.html
    """
    check_output(out, resume)
    inputs = _inputs(paths, listed, root)
    read: list[str | Path] = [*inputs, *options.model_files(bundle), *([listed] if listed else [])]
    check_outputs({"--out": out, "--report": report, "--summary": summary}, read)
    if report is not None:
        require("jinja2", "screen")
        require("PIL.Image", "screen")
    scorer = load_scorer(bundle, score, precision, device, backend)
    started = time.perf_counter()
    with progress_bar("screening") as advance, stop_on_signals() as should_stop:
        screened = screen_to_table(
            scorer, inputs, out,
            resume=resume, batch_size=batch_size, workers=workers, timeout=timeout,
            on_progress=advance, should_stop=should_stop, say=say,
        )  # fmt: skip
    if screened is None:
        raise typer.Exit(130)
    seconds = time.perf_counter() - started
    if report is not None:
        named = [*(paths or []), *([listed] if listed else [])]
        write_report(
            report, scorer, screened,
            inputs=named, model_name=bundle.name, results=out, reference_z=scorer.reference_z,
        )  # fmt: skip
    figures = {**screened.as_dict(), "seconds": round(seconds, 2), "out": utf8_text(str(out))}
    if summary is not None:
        write_json(figures, summary)
    if as_json:
        print_json(figures)
    say(
        f"{screened.count} files in {seconds:.1f} s: {screened.flagged} flagged, "
        f"{screened.errors} with errors\ntable: {out}" + (f"\nreport: {report}" if report else "")
    )


def pack(
    out: Annotated[Path, Option(help="Folder for the packed images.")],
    paths: options.Inputs = None,
    listed: options.FileList = None,
    root: options.Root = None,
    size: Annotated[
        int | None,
        Option(min=1, help="Side of the packed images in pixels, unless --bundle is given."),
    ] = None,
    bundle: Annotated[Path | None, Option(help="Model whose image size is taken.")] = None,
    workers: options.Workers = None,
    timeout: options.Timeout = TIMEOUT,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Decode image files once, to screen them many times as fast.

    Reads the same files as screen. Writes Arrow files with the images at the size of the model;
    give their folder to screen in place of the images.

    Example: squid-fast pack archive/ --out packed --bundle runs/zhang
    """
    check_folder(out)
    inputs = _inputs(paths, listed, root)
    side = size if bundle is None else load_bundle(bundle).model.image_size
    if side is None or None not in (size, bundle):
        raise ValueError(
            "give either --size or --bundle, which sets the size of the packed images; "
            f"{'neither' if side is None else 'both'} was given."
        )
    started = time.perf_counter()
    with progress_bar("packing") as advance:
        packed = pack_files(
            inputs, out, side, resume=resume, on_progress=advance, workers=workers, timeout=timeout
        )
    seconds = round(time.perf_counter() - started, 2)
    if packed.left_out:
        say(counted(packed.left_out))
    if as_json:
        print_json({**dataclasses.asdict(packed), "seconds": seconds, "out": utf8_text(str(out))})
    say(
        f"{packed.files} files in {seconds:.1f} s: {packed.errors} with errors, "
        f"{packed.bytes / 1e6:.1f} MB in {packed.shards} packed files\nfolder: {out}"
    )


def export(
    bundle: options.BundleFolder,
    out: Annotated[Path, Option(help="File for the graph, ending in .onnx or .pt2.")],
    score: options.ExportedScore = None,
) -> None:
    """Export a model as one file that runs without squid-fast.

    Reads the folder of a trained model. Writes a graph in float32 from images to their scores,
    for ONNX Runtime (.onnx) or torch.export.load (.pt2).

    Example: squid-fast export runs/zhang --out zhang.onnx
    """
    check_export(out)
    check_distinct({"--out": out}, {"the model's": options.model_files(bundle)})
    write_export(Scorer.load(bundle, score, "float32", "cpu"), out)
    say(f"written: {out}, {out.stat().st_size / 1e6:.1f} MB")


def bench(
    bundle: Annotated[
        Path | None, Option(help="Folder of a trained model.", show_default="random weights")
    ] = None,
    preset: Annotated[options.PresetName, Option(help="Network with random weights.")] = "zhanglab",
    data: Annotated[
        Path | None, Option(help="Folder of image files.", show_default="synthetic JPEG files")
    ] = None,
    batch_size: options.BatchSize = 16,
    rounds: Annotated[int, Option(min=1, help="Number of timings of each way.")] = 5,
    seconds: Annotated[float, Option(min=0, help="Length of a run over files in seconds.")] = 10.0,
    threads: Annotated[
        int | None, Option(min=1, help="Number of CPU threads.", show_default="PyTorch's own")
    ] = None,
    out: Annotated[Path | None, Option(help="JSON file for the results.")] = None,
    device: options.Device = None,
    precision: options.Precision = "auto",
    backend: options.Backend = "eager",
    as_json: options.Json = False,
) -> None:
    """Measure how fast this machine scores images.

    Scores the same images with squid-fast and in the way of the published code, from memory and
    from files, and prints images per second. Takes a minute or two.

    Example: squid-fast bench --bundle runs/zhang --data archive/
    """
    if out is not None:
        check_file(out)
    check_distinct({"--out": out}, {"the model's": options.model_files(bundle)})
    if threads is not None:
        torch.set_num_threads(threads)
    where = choose_device(device)
    check_hardware(precision, where, backend)
    measured = load_bundle(bundle) if bundle else random_bundle(find_preset(preset))
    benchmark = Benchmark(measured, where, precision, batch_size, rounds, seconds, data, backend)
    about = {"model": str(bundle or preset), "data": str(data) if data else None}
    figures = about | benchmark.run(progress=progress_bar)
    if out is not None:
        write_json(figures, out)
    if as_json:
        print_json(figures)
    else:
        print_table(bench_table(figures))


def _inputs(paths: list[str] | None, listed: str | None, root: Path | None) -> list[str]:
    """The files to read: those named on the command line, then those in the list."""
    if not paths and listed is None:
        raise ValueError("nothing to read is given; name files, folders or patterns, or a --list.")
    if root is not None and listed is None:
        raise ValueError(f"--root is {root}, but there is no --list; give both, or no --root.")
    return [*(paths or []), *(read_list(listed, root) if listed is not None else [])]
