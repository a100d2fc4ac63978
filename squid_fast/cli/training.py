"""The verbs around training: train, diagnose."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data import ImageSet, find_records, load_images
from ..data.contamination import check_apart, contaminated
from ..experiments.baselines import RECIPE, BaselineResult, train_baseline
from ..experiments.diagnostics import TrainingSnapshots, draw_memory, memory_use
from ..inference.bundle import load_bundle
from ..presets import Keep
from ..presets import preset as find_preset
from ..training import TrainingResult, load_splits, train_bundle
from ..training.logs import LogKind
from ..utils.atomic import write_json
from ..utils.devices import choose_device, choose_precision
from .console import print_json, progress_bar, say, stop_on_signals, training_report
from .options import (
    BundleFolder,
    Data,
    Device,
    Json,
    Layout,
    MethodName,
    PresetName,
    Rate,
    Resume,
    ScoreName,
    Seed,
    Threads,
    TrainingPrecision,
)

BY_PRESET = "by preset and method"


def train(
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoints and logs, and then the trained model.")
    ],
    preset: Annotated[
        PresetName, typer.Option(help="Network, image size and training settings.")
    ] = "zhanglab",
    method: Annotated[MethodName, typer.Option(help="SQUID, or a baseline for comparison.")] = (
        "squid"
    ),
    layout: Layout = "auto",
    contaminate: Annotated[
        Path | None,
        typer.Option(help="Folder of unlabelled images to mix into the training set as normal."),
    ] = None,
    contamination_rate: Annotated[
        float | None,
        typer.Option(help="Share of the training set taken from --contaminate, between 0 and 1."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Number of epochs.", show_default=BY_PRESET)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of images in a batch, over all processes.", show_default=BY_PRESET
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the generator.", show_default=BY_PRESET)
    ] = None,
    ema_decay: Annotated[
        float | None,
        typer.Option(
            help="Decay of the moving average of the discriminator's weights, such as 0.998; 0 "
            "means no average.",
            show_default=BY_PRESET,
        ),
    ] = None,
    keep: Annotated[
        Keep | None,
        typer.Option(
            help="Epoch whose weights are kept: the last, or the best by validation AUROC.",
            show_default=BY_PRESET,
        ),
    ] = None,
    validate_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of epochs from one validation to the next.", show_default=BY_PRESET
        ),
    ] = None,
    score: Annotated[
        ScoreName, typer.Option(help="Score that the trained model ranks and flags images by.")
    ] = "discriminator_instance",
    false_positive_rate: Rate = 0.05,
    seed: Seed = 0,
    device: Device = None,
    precision: TrainingPrecision = "auto",
    threads: Threads = None,
    sync_batch_norm: Annotated[
        bool, typer.Option(help="Batch normalisation over the batches of all processes.")
    ] = True,
    cuda_graphs: Annotated[
        bool, typer.Option(help="Training steps as CUDA graphs, which is faster on one GPU.")
    ] = True,
    pictures: Annotated[
        bool, typer.Option(help="Pictures of reconstructions and memories at every validation.")
    ] = True,
    log: Annotated[LogKind, typer.Option(help="Format of the training curves.")] = "csv",
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a model on normal images.

    Reads the normal images of the split train, and those of val, if there are any, to set
    thresholds. Writes a folder that evaluate, screen and export take. Ctrl-C saves a checkpoint
    before it stops. With torchrun, training runs on several GPUs.

    Example: squid-fast train --preset zhanglab --data chest_xray --out runs/zhang
    """
    chosen = find_preset(preset)
    choose_precision(precision, choose_device(device))  # refuses before images are read
    given: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "ema_decay": ema_decay,
        "validate_every": validate_every, "keep": keep,
    }  # fmt: skip
    of_squid = {"ema-decay": ema_decay, "validate-every": validate_every, "keep": keep}
    for name, value in of_squid.items():
        if method != "squid" and value is not None:
            raise ValueError(
                f"--{name} {value} has no effect on --method {method}; leave it out, or train "
                "squid."
            )
    recipe = dataclasses.replace(
        chosen.recipe if method == "squid" else RECIPE,
        **{name: value for name, value in given.items() if value is not None},
    )
    train_set, validation_set, about = _images(
        data, layout, chosen.image_size, contaminate, contamination_rate, seed
    )
    common: dict[str, Any] = {
        "recipe": recipe, "validation_set": validation_set, "seed": seed, "device": device,
        "false_positive_rate": false_positive_rate, "precision": precision,
        "thread_count": threads, "resume": resume, "about": about,
    }  # fmt: skip
    with stop_on_signals() as should_stop, training_report() as report:
        common |= {"report": report, "should_stop": should_stop}
        result: TrainingResult | BaselineResult
        if method != "squid":
            result = train_baseline(method, train_set, out, **common)
        else:
            if pictures:
                common["observe"] = TrainingSnapshots(out, validation_set or train_set).add
            result = train_bundle(
                chosen,
                train_set,
                out,
                score=score,
                sync_batch_norm=sync_batch_norm,
                graphs=cuda_graphs,
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
    bundle: BundleFolder,
    data: Data,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for memory.png and memory.json.",
            show_default="pictures in the model's folder",
        ),
    ] = None,
    layout: Layout = "auto",
    as_json: Json = False,
) -> None:
    """Show how a trained model uses its memories.

    Reads normal training images. Writes a picture and a JSON file that say how often each slot of
    a memory is used, and how similar the slots are to features of the images.

    Example: squid-fast diagnose runs/zhang --data chest_xray
    """
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
    """Training and validation images, and a description of what was mixed into the former."""
    if (contaminate is None) != (rate is None):
        raise ValueError(
            f"--contaminate is {contaminate} and --contamination-rate {rate}; give both, or "
            "neither for training images as they are."
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
    contaminants = find_records(contaminate)
    held_out = [record.path for record in records if record.split in ("val", "test")]
    check_apart([record.path for record in contaminants], held_out)
    mixed, paths = contaminated(train_set, load_images(contaminants, size), rate, seed)
    say(f"{len(paths)} images from {contaminate} mixed in: {len(paths) / len(mixed):.1%}")
    about = {"folder": str(contaminate), "rate": rate, "images": len(paths)}
    return mixed, validation_set, {"contamination": about}
