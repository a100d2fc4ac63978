"""Where the time of scoring goes, stage by stage, and what each precision does to the ranking.

Every stage of the published model and of the frozen one, in each precision, is timed on the same
images. With a trained bundle and labelled images, scores are compared with those of the published
model on the test images. Figures go to ``stages_cpu.json``.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from squid_fast import PRESETS, Bundle, Scorer, load_bundle, reference
from squid_fast.data import ImageSet, find_records, load_images, select
from squid_fast.experiments.benchmark import random_bundle
from squid_fast.inference.calibration import rank_correlation
from squid_fast.inference.precision import can_use_int8
from squid_fast.inference.scores import PAPER_SCORE, SCORES
from squid_fast.metrics import image_auroc
from squid_fast.utils.devices import has_fast_bf16

from ..arguments import add_data, add_folder, add_option, add_output, add_threads
from ..measurements import Results

PRECISIONS = ("float32", "bf16", "int8")
# Names of the modules that do the same work in the published model and in the frozen one.
STAGES = {
    "in_conv": "first stage",
    "down_blocks": "encoder",
    "downs": "encoder",
    "inpaint_block": "in-painting",
    "inpaint": "in-painting",
    "up_blocks": "decoder",
    "ups": "decoder",
    "memory_blocks": "decoder memories",
    "memories": "decoder memories",
    "out_conv": "head",
    "head": "head",
    "teacher_ups": "teacher",
    "teacher_out": "teacher",
}


class StageClock:
    """Seconds spent in the stages of a network while it runs."""

    def __init__(self, network: nn.Module) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._started: dict[nn.Module, float] = {}
        for name, module in network.named_children():
            if stage := STAGES.get(name):
                parts = list(module) if isinstance(module, nn.ModuleList) else [module]
                for i, part in enumerate(parts):
                    several = len(parts) > 1 and stage != "teacher"
                    stop = partial(self._stop, f"{stage} {i + 1}" if several else stage)
                    part.register_forward_pre_hook(self._start)
                    part.register_forward_hook(stop)

    def _start(self, module: nn.Module, _: object) -> None:
        self._started[module] = time.perf_counter()

    def _stop(self, name: str, module: nn.Module, *_: object) -> None:
        self.seconds[name] += time.perf_counter() - self._started[module]


def published(bundle: Bundle) -> tuple[Callable[[Tensor], Tensor], StageClock]:
    """The published way of scoring a batch: float32, teacher included."""
    plain = reference.SQUID(**bundle.model.config).eval()
    plain.load_state_dict(bundle.model.state_dict())
    discriminator = reference.Discriminator(bundle.discriminator.size).eval()
    discriminator.load_state_dict(bundle.discriminator.state_dict())

    @torch.no_grad()
    def score(images: Tensor) -> Tensor:
        return reference.discriminator_logits(discriminator, plain(images)["recon"])

    return score, StageClock(plain)


def frozen(bundle: Bundle, precision: str) -> tuple[Callable[[Tensor], Tensor], StageClock]:
    """``Scorer`` in that precision."""
    pair = bundle.model, bundle.discriminator
    scorer = Scorer(*pair, bundle.calibration, PAPER_SCORE, precision, "cpu")
    clock = StageClock(scorer.model.generator)
    return lambda images: scorer.measure(images, [PAPER_SCORE])[0][PAPER_SCORE], clock


def computed_in(bundle: Bundle) -> list[str]:
    """Those of ``PRECISIONS`` that this processor and the bundle's calibration allow."""
    cpu = torch.device("cpu")
    able = {"bf16": has_fast_bf16(cpu), "int8": can_use_int8(bundle.calibration, cpu)}
    return [precision for precision in PRECISIONS if able.get(precision, True)]


def times(bundle: Bundle, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds for an image in every stage, medians of interleaved rounds, by contender."""
    side = bundle.model.image_size
    images = torch.rand(batch, 1, side, side, generator=torch.Generator().manual_seed(0))
    contenders = {"published": published(bundle)}
    contenders |= {precision: frozen(bundle, precision) for precision in computed_in(bundle)}
    found: dict[str, dict[str, list[float]]] = {n: defaultdict(list) for n in contenders}
    for round_ in range(rounds + 1):  # the first warms up
        for name, (score, clock) in contenders.items():
            clock.seconds.clear()
            started = time.perf_counter()
            score(images)
            total = time.perf_counter() - started
            rest = total - sum(clock.seconds.values())
            seconds = clock.seconds | {"everything else": rest, "total": total}
            for stage, value in seconds.items() if round_ else ():
                found[name][stage].append(1e3 * value / batch)
    return {
        name: {stage: round(statistics.median(values), 3) for stage, values in stages.items()}
        for name, stages in found.items()
    }


def ranking(bundle: Bundle, test: ImageSet) -> dict[str, dict[str, dict[str, float]]]:
    """By precision and score: rank correlation with float32, AUROC, and the noise.

    The noise is the deviation of the difference to float32, in deviations of the score. The paper's
    score in float32 is that of the published model, run plainly, a few images at a time.
    """
    plain, _ = published(bundle)
    parts = [plain(test.batch(slice(start, start + 8))) for start in range(0, len(test), 8)]
    calibrations = dict.fromkeys(computed_in(bundle), bundle.calibration)
    known = bundle.calibration and bundle.calibration.quantization
    if bundle.calibration and known and "int8" in calibrations:
        names = [f"{p}.{i}" for p in ("downs", "ups") for i in range(bundle.model.level)]
        everywhere = replace(bundle.calibration, quantization=replace(known, stages=names))
        calibrations["int8 everywhere"] = everywhere
    labels, exact, found = test.labels.numpy(), {}, {}
    for name, calibration in calibrations.items():
        pair = bundle.model, bundle.discriminator
        scorer = Scorer(*pair, calibration, PAPER_SCORE, name.split()[0], "cpu")
        values = scorer.raw_scores(test)
        exact = exact or values | {PAPER_SCORE: torch.cat(parts)}
        found[name] = {
            score: {
                "rank_correlation": rank_correlation(exact[score], raw),
                "noise": round(float((raw - exact[score]).std() / exact[score].std()), 4),
                "auroc": round(image_auroc(labels, SCORES[score][0] * raw.numpy()), 4),
            }
            for score, raw in values.items()
        }
    return found


def add_arguments(parser: ArgumentParser) -> None:
    add_folder(parser, "--bundle", "Trained model. Default: random weights, which are only timed.")
    add_data(parser, required=False)
    add_option(parser, "--batch", 16, "Number of images in a batch")
    add_option(parser, "--rounds", 9, "Number of rounds")
    add_threads(parser)
    add_output(parser)


def main(options: Namespace) -> None:
    """Measure and write the results file."""
    torch.set_num_threads(options.threads)
    preset = PRESETS["zhanglab"]
    bundle = load_bundle(options.bundle) if options.bundle else random_bundle(preset)
    known = bundle.calibration and bundle.calibration.quantization
    settings = {"batch": options.batch, "rounds": options.rounds, "about": bundle.about}
    results = Results(options.output / "stages_cpu.json", torch.device("cpu"), settings)
    results.figures["stages_in_int8"] = known.stages if known else None
    results.figures["milliseconds"] = times(bundle, options.batch, options.rounds)
    if options.bundle and options.data:
        records = [r for r in select(find_records(options.data), "test") if r.label is not None]
        test = load_images(records, bundle.model.image_size)
        results.figures |= {"images": len(test), "ranking": ranking(bundle, test)}
    results.write()
    print(results.path.read_text(encoding="utf-8"))
