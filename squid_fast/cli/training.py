"""The verbs that train and look into what was trained: train, diagnose."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data import ImageSet, find_records, load_images
from ..data.contamination import check_apart, contaminated
from ..experiments.baselines import METHODS, RECIPE, MethodResult, train_method
from ..experiments.diagnostics import Diary, draw_memory, memory_use
from ..inference.bundle import load_bundle
from ..presets import Keep
from ..presets import preset as find_preset
from ..training import TrainingResult, load_splits, train_bundle
from ..training.logs import LogKind
from ..utils.atomic import write_json
from ..utils.devices import choose_device, choose_precision
from .console import print_json, progress_bar, say, stop_on_signals, training_report
from .options import Data, Device, Json, Layout, Rate, Threads, TrainingPrecision


def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Run folder; becomes the trained bundle.")],
    preset: Annotated[
        str, typer.Option(help="zhanglab, zhanglab_cpu, chexpert, digit_anatomy, small.")
    ] = "zhanglab",
    method: Annotated[
        str, typer.Option(help=f"squid, or what it is compared with: {', '.join(METHODS)}.")
    ] = "squid",
    layout: Layout = "auto",
    contaminate: Annotated[
        Path | None, typer.Option(help="Unlabelled images to mix in, as if they were normal.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Share of the training set that --contaminate becomes.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Of all processes together.")] = (
        None
    ),
    lr: Annotated[float | None, typer.Option(help="Of the generator.")] = None,
    averaging: Annotated[
        float | None, typer.Option(help="Share that the averaged discriminator keeps; 0: none.")
    ] = None,
    keep: Annotated[
        Keep | None, typer.Option(help="Which epoch's pair is the trained model: by validation.")
    ] = None,
    validate_every: Annotated[int | None, typer.Option(min=1, help="Epochs.")] = None,
    score: Annotated[str, typer.Option(help="What the bundle screens by.")] = (
        "discriminator_instance"
    ),
    false_positive_rate: Rate = 0.05,
    seed: int = 0,
    device: Device = None,
    precision: TrainingPrecision = "auto",
    threads: Threads = None,
    sync_batch_norm: Annotated[
        bool, typer.Option(help="Batch norm over the batches of all processes.")
    ] = True,
    graphs: Annotated[bool, typer.Option(help="On one GPU: the step as a CUDA graph.")] = True,
    pictures: Annotated[bool, typer.Option(help="Memories and reconstructions, drawn.")] = True,
    log: Annotated[LogKind, typer.Option(help="Where figures go.")] = "csv",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train on normal images; Ctrl-C saves, --resume goes on. torchrun starts it on many GPUs."""
    chosen = find_preset(preset)
    choose_precision(precision, choose_device(device))  # rather now than when images are read
    given: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "averaging": averaging,
        "validate_every": validate_every, "keep": keep,
    }  # fmt: skip
    for name in ("averaging", "validate_every", "keep"):
        if method != "squid" and given[name] is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} {given[name]} is of no effect on --method {method}; "
                "leave it out, or train squid."
            )
    recipe = dataclasses.replace(
        chosen.recipe if method == "squid" else RECIPE,
        **{name: value for name, value in given.items() if value is not None},
    )
    train_set, validation_set, about = _images(
        data, layout, chosen.image_size, contaminate, rate, seed
    )
    common: dict[str, Any] = {
        "recipe": recipe, "validation_set": validation_set, "seed": seed, "device": device,
        "false_positive_rate": false_positive_rate, "precision": precision,
        "thread_count": threads, "resume": resume, "about": about,
    }  # fmt: skip
    with stop_on_signals() as should_stop, training_report() as report:
        common |= {"report": report, "should_stop": should_stop}
        result: TrainingResult | MethodResult
        if method != "squid":
            result = train_method(method, train_set, out, **common)
        else:
            if pictures:
                common["observe"] = Diary(out, validation_set or train_set).add
            result = train_bundle(
                chosen,
                train_set,
                out,
                score=score,
                sync_batch_norm=sync_batch_norm,
                graphs=graphs,
                log=log,
                **common,
            )
    if as_json:
        print_json(
            {
                "finished": result.finished,
                "step": result.step,
                "validation": result.validation,
                "out": str(out),
            }
        )
    if not result.finished:
        say(f"stopped after step {result.step} and saved; go on with --resume", "yellow")
        raise typer.Exit(130)
    say(
        f"trained: {out}\nnext: squid-fast evaluate {out} --data {data}\n"
        f"      squid-fast screen {out} FILES... --out results.csv --report report.html"
    )


def diagnose(
    bundle: Annotated[Path, typer.Argument(help="Trained bundle.")],
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Folder for memory.png and memory.json.")] = None,
    layout: Layout = "auto",
    as_json: Json = False,
) -> None:
    """How a trained model uses its memories, on normal training images."""
    model = load_bundle(bundle).model
    out = out or bundle / "pictures"
    with progress_bar("reading images") as advance:
        images, _ = load_splits(find_records(data, layout), model.image_size, advance)
    uses = memory_use(model, images)
    out.mkdir(parents=True, exist_ok=True)
    draw_memory(uses, out / "memory.png")
    figures = {name: use.figures() for name, use in uses.items()}
    write_json(figures, out / "memory.json")
    if as_json:
        print_json(figures)
    say(f"written: {out / 'memory.png'}, {out / 'memory.json'}")


def _images(
    data: Path, layout: str, size: int, contaminate: Path | None, rate: float | None, seed: int
) -> tuple[ImageSet, ImageSet | None, dict[str, Any]]:
    """Training and validation images, and what was mixed into the former."""
    if (contaminate is None) != (rate is None):
        raise ValueError(
            f"--contaminate is {contaminate} and --rate {rate}; give both, or neither for training "
            "images as they are."
        )
    records = find_records(data, layout)
    with progress_bar("reading images") as advance:
        train_set, validation_set = load_splits(records, size, advance)
    say(
        f"{len(train_set)} normal training images, "
        f"{0 if validation_set is None else len(validation_set)} for validation"
    )
    if contaminate is None or rate is None:
        return train_set, validation_set, {}
    others = find_records(contaminate)
    held_out = [record.path for record in records if record.split in ("val", "test")]
    check_apart([record.path for record in others], held_out)
    mixed, paths = contaminated(train_set, load_images(others, size), rate, seed)
    say(f"{len(paths)} images from {contaminate} mixed in: {len(paths) / len(mixed):.1%}")
    about = {"folder": str(contaminate), "rate": rate, "images": len(paths)}
    return mixed, validation_set, {"contamination": about}
