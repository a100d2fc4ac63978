"""The verbs around training: train, diagnose."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from ..data import ImageSet, find_records, load_images
from ..data.contamination import check_apart, check_contamination_rate, contaminated
from ..data.images import UNKNOWN
from ..experiments.baselines import METHODS, RECIPE, BaselineResult, train_baseline
from ..experiments.baselines.shallow import PixelMethod
from ..experiments.diagnostics import TrainingSnapshots, draw_memory, memory_use
from ..inference.bundle import load_bundle
from ..inference.calibration import check_rate
from ..inference.scores import PAPER_SCORE, SCORES
from ..presets import Keep
from ..presets import preset as find_preset
from ..training import TrainingResult, load_splits, train_bundle
from ..training.checkpoint import check_run_folder
from ..training.logs import LogKind, check_log
from ..training.loop import has_both_classes
from ..utils.atomic import write_json
from ..utils.devices import choose_device, choose_precision
from ..utils.extras import require
from ..utils.outputs import check_folder
from ..utils.seeds import check_seed
from ..utils.text import utf8_text
from ..utils.threads import check_threads
from . import options
from .console import print_json, progress_bar, say, stop_on_signals, training_report
from .datasets import found_records


def train(
    data: options.Data,
    out: Annotated[Path, Option(help="Folder for checkpoints, logs and the trained model.")],
    preset: options.Preset = "zhanglab",
    method: Annotated[
        options.MethodName,
        Option(metavar="<name>", help=f"squid, or a baseline: {', '.join(METHODS)}."),
    ] = "squid",
    layout: options.Layout = "auto",
    contaminate: Annotated[
        Path | None, Option(help="Folder of images to mix in as normal.")
    ] = None,
    contamination_rate: Annotated[
        float | None,
        Option(help="Share of them in the training set, between 0 and 1; it has no default."),
    ] = None,
    epochs: Annotated[int | None, Option(min=1, help="Number of epochs.")] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Batch size over all processes.")] = None,
    lr: Annotated[float | None, Option(help="Learning rate of the generator.")] = None,
    ema_decay: Annotated[
        float | None, Option(help="Decay of the discriminator's moving average; 0 for no average.")
    ] = None,
    keep: Annotated[
        Keep | None, Option(help="Epoch to keep: the last, or the best by validation AUROC.")
    ] = None,
    validate_every: Annotated[int | None, Option(min=1, help="Epochs between validations.")] = None,
    score: Annotated[
        options.AnyScoreName | None,
        options.score_option(SCORES, f"{PAPER_SCORE}, or that of the baseline"),
    ] = None,
    false_positive_rate: options.Rate = 0.05,
    seed: options.Seed = 0,
    device: options.Device = None,
    precision: options.TrainingPrecision = "auto",
    threads: options.Threads = None,
    sync_batch_norm: Annotated[bool, Option(help="Batch normalisation over all processes.")] = True,
    cuda_graphs: Annotated[bool, Option(help="CUDA graphs, which are faster on one GPU.")] = True,
    pictures: Annotated[bool, Option(help="Pictures of reconstructions and memories.")] = True,
    log: Annotated[LogKind, Option(help="Format of the training curves.")] = "csv",
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Train a model on normal images.

    Reads the normal images of the split train. Those of val, if there are any, set thresholds;
    with abnormal ones, val also shows the best epoch. Writes a folder that evaluate, screen and
    export take. Training settings that are not given are those of the preset or the baseline.
    Ctrl-C saves a checkpoint before it stops. With torchrun, training runs on several GPUs.

    Example: squid-fast train --data chest_xray --out runs/zhang
    """
    # All that can be wrong without a look at the images is refused before they are read.
    chosen, squid = find_preset(preset), method == "squid"
    choose_precision(precision, choose_device(device))
    check_seed(seed)
    check_rate(false_positive_rate)
    if contamination_rate is not None:
        check_contamination_rate(contamination_rate)
    check_threads(threads)
    own = SCORES if squid else [METHODS[method][0].score_name]
    if score not in (None, *own):
        raise ValueError(f"--score is {score!r}; a {method} has {', '.join(own)}.")
    if squid or not issubclass(METHODS[method][0], PixelMethod):
        check_run_folder(out, resume)
    check_log(log)
    if squid and pictures:
        require("matplotlib.figure", "train")
    changes: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "ema_decay": ema_decay,
        "validate_every": validate_every, "keep": keep,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    for name in ("ema_decay", "validate_every", "keep"):
        if not squid and name in changes:
            raise ValueError(
                f"--{name.replace('_', '-')} {changes[name]} has no effect on --method {method}; "
                "leave it out, or train squid."
            )
    recipe = dataclasses.replace(chosen.recipe if squid else RECIPE, **changes)
    train_set, validation_set, about = _images(
        data, layout, chosen.image_size, contaminate, contamination_rate, seed
    )
    if keep == "best" and not has_both_classes(validation_set):
        raise ValueError(
            "--keep is best, which takes normal and anomalous images in the split val; 'last' "
            "would fit."
        )
    common: dict[str, Any] = {
        "recipe": recipe, "validation_set": validation_set, "seed": seed, "device": device,
        "false_positive_rate": false_positive_rate, "precision": precision,
        "thread_count": threads, "resume": resume, "about": about,
    }  # fmt: skip
    with stop_on_signals() as should_stop, training_report() as report:
        common |= {"report": report, "should_stop": should_stop}
        result: TrainingResult | BaselineResult
        if not squid:
            result = train_baseline(method, train_set, out, **common)
        else:
            if pictures:
                common["observe"] = TrainingSnapshots(out, validation_set or train_set).add
            result = train_bundle(
                chosen, train_set, out,
                score=score or PAPER_SCORE, sync_batch_norm=sync_batch_norm, graphs=cuda_graphs,
                log=log, **common,
            )  # fmt: skip
    if as_json:
        facts = {"finished": result.finished, "step": result.step, "validation": result.validation}
        print_json(facts | {"out": utf8_text(str(out))})
    if not result.finished:
        say(f"stopped after step {result.step} and saved; go on with --resume", "yellow")
        raise typer.Exit(130)
    say(
        f"trained: {out}\nnext: squid-fast evaluate {out} --data {data}\n"
        f"      squid-fast screen {out} FILES... --out results.csv --report report.html"
    )


def diagnose(
    bundle: options.BundleFolder,
    data: options.Data,
    out: Annotated[
        Path | None,
        Option(
            help="Folder for memory.png and memory.json.",
            show_default="pictures in the model's folder",
        ),
    ] = None,
    layout: options.Layout = "auto",
    as_json: options.Json = False,
) -> None:
    """Show how a trained model uses its memories.

    Reads normal training images. Writes a picture and a JSON file that say how often each slot of
    a memory is used, and how similar the slots are to features of the images.

    Example: squid-fast diagnose runs/zhang --data chest_xray
    """
    out = out or bundle / "pictures"
    check_folder(out)
    require("matplotlib.figure", "train")
    model = load_bundle(bundle).model
    with progress_bar("reading images") as advance:
        images, _ = load_splits(found_records(data, layout), model.image_size, advance)
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
    records = found_records(data, layout)
    contaminants = [] if contaminate is None else find_records(contaminate, "flat")
    held_out = [record.path for record in records if record.split in ("val", "test")]
    check_apart([record.path for record in contaminants], held_out)
    with progress_bar("reading images") as advance:
        train_set, validation_set = load_splits(records, size, advance)
    count = 0 if validation_set is None else len(validation_set)
    say(f"{len(train_set)} training images, {count} for validation")
    if unknown := int((train_set.labels == UNKNOWN).sum()):
        say(f"{unknown} training images of unknown label are taken as normal", "yellow")
    if contaminate is None or rate is None:
        return train_set, validation_set, {}
    mixed, paths = contaminated(train_set, load_images(contaminants, size), rate, seed)
    say(f"{len(paths)} images from {contaminate} mixed in: {len(paths) / len(mixed):.1%}")
    about = {"folder": str(contaminate), "rate": rate, "images": len(paths)}
    return mixed, validation_set, {"contamination": about}
