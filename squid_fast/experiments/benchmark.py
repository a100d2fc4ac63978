"""How fast this machine scores images, compared with the published way.

The published way runs the whole model in float32, teacher included, on one image at a time. It and
``squid_fast.Scorer`` take turns, round by round, on the same images with the same weights. Figures
are medians over the rounds. Ratios are taken within a round, since they hold even on a machine
that has other work to do, where seconds mean little.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import ImageSet, load_image
from ..data.readers import load_bytes
from ..inference import Scorer
from ..inference.bundle import Bundle
from ..inference.calibration import observe_ranges
from ..inference.model import FrozenModel
from ..inference.precision import can_use_int8
from ..inference.quantization import has_int8
from ..inference.scores import PAPER_SCORE, Calibration, Quantization, ScoreCalibration
from ..modules import SQUID, Discriminator, discriminator_size
from ..presets import Preset
from ..screening import find_files, screen
from ..screening.reading.files import PACKED_SUFFIX
from ..utils.devices import Backend, ScoringPrecision, has_fast_bf16
from ..utils.extras import require
from ..utils.machine import describe
from .published import check_agreement, published_way

Contenders = dict[str, tuple[int, Callable[[], object]]]  # name to (images per call, call)
Seconds = dict[str, list[float]]  # name to the time of one image, by round
Rows = dict[str, dict[str, float]]
OnProgress = Callable[[int, int], None]  # takes (done, total)
Progress = Callable[[str], AbstractContextManager[OnProgress]]

PARTS = ("evaluation", "screening")

_JPEG_SIDE = 224  # pixels, of the published ZhangLab files
_ROUNDS_OF_FILES = 3  # a run over files is long, so that few of them vary little
_MOST_MADE_UP = 8192  # files
_INT8_STAGES = ("downs.2", "downs.3", "ups.0", "ups.1", "ups.2")
_AGREED = 32  # images whose scores both ways must agree on
_NO_CALIBRATION = Calibration({PAPER_SCORE: ScoreCalibration(0, 1, 0, 0.05, [])}, [], [], "")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A measurement of scoring speed.

    Attributes:
        bundle: the model. It is scored by the paper's score, whatever it is configured for.
        precision: of the scorer, int8 with a calibrated bundle alone; the published way computes
            in float32.
        batch: number of images scored at once.
        rounds: number of timings of each contender; at most 3 for files.
        seconds: approximate time of a run over files. At least four batches are taken, and at most
            8,192 synthetic files.
        data: file or folder of images; by default, synthetic JPEG files are written.
        backend: of the scorer; "compile" is timed beside "eager", and scores the files.

    Raises:
        ValueError: ``data`` holds no image files, or a number is out of range.
    """

    bundle: Bundle
    device: torch.device
    precision: ScoringPrecision = "auto"
    batch: int = 16
    rounds: int = 5
    seconds: float = 10.0
    data: Path | None = None
    backend: Backend = "eager"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.rounds < 1 or not 0 <= self.seconds < math.inf:
            raise ValueError(
                f"batch is {self.batch}, rounds {self.rounds} and seconds {self.seconds}; batch "
                "and rounds must be 1 or more, seconds a number from 0 on."
            )
        if self.data:
            _image_files(self.data)  # raises before the model is timed

    def run(
        self,
        parts: Collection[str] = PARTS,
        progress: Progress = lambda part: nullcontext(lambda done, total: None),
    ) -> dict[str, Any]:
        """Measure some of ``PARTS``, and return figures for JSON.

        Keys: those of ``describe``, precision, backend, image_size, batch, rounds, and each part
        with its rows by name (see ``figures``). The part "evaluation" scores images from memory,
        including their way to the device and back; "screening" scores files, including the start
        of the processes that read them. Rows of "evaluation" have ``ratio_at_equal_batch`` if the
        published way is timed at the same batch size. The row of ``screen`` has
        ``share_of_scorer``: its rate over that of the same scorer on images from memory.

        Raises:
            ValueError: none of the files in ``data`` can be read.
            RuntimeError: the two ways do not agree in float32, so that comparing them is pointless.
        """
        measure = {"evaluation": self._evaluation, "screening": self._screening}
        results: dict[str, Any] = {
            **describe(self.device),
            "precision": self.scorer(self.precision, self.backend).precision,
            "backend": self.backend, "image_size": self.bundle.model.image_size,
            "batch": self.batch, "rounds": self.rounds,
        }  # fmt: skip
        for part in parts:
            with progress(part) as advance:
                results[part] = measure[part](advance)
        return results

    def _evaluation(self, on_progress: OnProgress) -> Rows:
        published = published_way(self.bundle, self.device)
        plain, best = self.scorer("float32"), self.scorer(self.precision)
        scorers = {scorer.precision: scorer for scorer in (plain, best)}
        if has_fast_bf16(self.device):
            scorers.setdefault("bf16", self.scorer("bf16"))
        if can_use_int8(self.bundle.calibration, self.device):
            scorers.setdefault("int8", self.scorer("int8"))
        check_agreement(published, plain, _images(_AGREED, plain.image_size))
        on_gpu = self.device.type == "cuda"  # small batches would not keep it busy
        large = self.batch * (16 if on_gpu else 4)
        images = _images(large, self.bundle.model.image_size)
        contenders: Contenders = {}
        for count in dict.fromkeys((1, self.batch, large if on_gpu else 1)):
            call = partial(published, images[:count])
            contenders[f"published way, batch of {count}"] = (count, call)
        timed = [*((scorer, self.batch) for scorer in scorers.values()), (best, large)]
        if self.backend == "compile":
            compiled = self.scorer(self.precision, "compile")
            timed += [(compiled, self.batch), (compiled, large)]
        for scorer, count in timed:
            how = scorer.precision + (", compiled" if scorer.backend == "compile" else "")
            name = f"squid_fast.Scorer, {how}, batch of {count}"
            contenders[name] = (count, partial(scorer.score, images[:count]))
        seconds = compare(contenders, self.rounds, on_progress)
        rows = figures(contenders, seconds)
        for name, row in rows.items():
            equal = f"published way, batch of {contenders[name][0]}"
            if equal in seconds:
                row["ratio_at_equal_batch"] = times_as_fast(seconds[equal], seconds[name])
        return rows

    def _screening(self, on_progress: OnProgress) -> Rows:
        published = published_way(self.bundle, self.device)
        scorer = self.scorer(self.precision, self.backend)
        size = self.bundle.model.image_size
        with tempfile.TemporaryDirectory() as folder:
            trial = partial(scorer.score, _images(self.batch, size))
            wanted = int(self.seconds / compare({"": (self.batch, trial)}, 1)[""][0])
            count = max(4 * self.batch, wanted if self.data else min(wanted, _MOST_MADE_UP))
            if self.data:
                files = _readable(scorer, _image_files(self.data), count)
            else:
                files = _write_jpegs(Path(folder), count)
            few, some = files[: self.batch], files[: 16 * self.batch]
            images = torch.from_numpy(np.stack([load_bytes(path, size) for path in some]))[:, None]

            def one_by_one() -> None:
                for path in few:
                    published(torch.from_numpy(load_image(path, size))[None, None])

            def from_memory() -> None:
                for batch in images.split(self.batch):
                    scorer.score(batch)

            def end_to_end() -> None:
                for row in screen(scorer, files, batch_size=self.batch):
                    if row.error:
                        raise RuntimeError(f"{row.path}: {row.error}")

            alone, ours = "squid_fast.Scorer, from memory", f"squid_fast.screen, {len(files)} files"
            contenders: Contenders = {
                "published way, file by file": (len(few), one_by_one),
                alone: (len(images), from_memory),
                ours: (len(files), end_to_end),
            }
            seconds = compare(contenders, min(self.rounds, _ROUNDS_OF_FILES), on_progress)
        rows = figures(contenders, seconds)
        rows[ours]["share_of_scorer"] = times_as_fast(seconds[alone], seconds[ours])
        return rows

    def scorer(self, precision: ScoringPrecision, backend: Backend = "eager") -> Scorer:
        """A scorer of the bundle by the paper's score."""
        pair = self.bundle.model, self.bundle.discriminator
        calibration = self.bundle.calibration or _NO_CALIBRATION
        return Scorer(*pair, calibration, PAPER_SCORE, precision, self.device, backend)


def compare(
    contenders: Contenders, rounds: int, on_progress: OnProgress = lambda done, total: None
) -> Seconds:
    """Seconds for one image by contender and round; they take turns after an untimed call of each.

    >>> seconds = compare({"sum": (100, lambda: sum(range(100)))}, rounds=3)
    >>> len(seconds["sum"])
    3
    """
    seconds: Seconds = {name: [] for name in contenders}
    total = (rounds + 1) * len(contenders)
    for turn in range(total):
        name = list(contenders)[turn % len(contenders)]
        count, call = contenders[name]
        started = time.perf_counter()
        call()
        if turn >= len(contenders):
            seconds[name].append((time.perf_counter() - started) / count)
        on_progress(turn + 1, total)
    return seconds


def times_as_fast(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times as fast as ``slow`` the other one is, the median over the rounds.

    >>> times_as_fast([2.0, 4.0, 3.0], [1.0, 1.0, 1.5])
    2.0
    """
    return round(statistics.median([a / b for a, b in zip(slow, fast, strict=True)]), 3)


def figures(contenders: Contenders, seconds: Seconds) -> Rows:
    """One row for each contender.

    Keys: images (in one call), images_per_second, milliseconds (for one image), and ratio (how
    many times as fast as the first contender).
    """
    first = next(iter(seconds.values()))
    return {
        name: {
            "images": contenders[name][0],
            "images_per_second": round(1 / statistics.median(times), 2),
            "milliseconds": round(1e3 * statistics.median(times), 4),
            "ratio": times_as_fast(first, times),
        }
        for name, times in seconds.items()
    }


def random_bundle(preset: Preset) -> Bundle:
    """A model with random weights, as fast as a trained one.

    Weights decide which stages tolerate int8; those are chosen here that tolerate it in a model
    trained on ZhangLab. The precision "auto" does not choose int8 for it.
    """
    torch.manual_seed(0)
    size = preset.image_size
    model, discriminator = SQUID(**preset.model), Discriminator(discriminator_size(size))
    for module in (*model.modules(), *discriminator.modules()):
        if isinstance(module, nn.BatchNorm2d):
            # A plain mean, without the initial statistics, which would damp every signal and give
            # all images the same score.
            module.momentum = None
    images = _images(8, size)
    with torch.no_grad():
        discriminator(model(images)["recon"])
    bundle = Bundle(model.eval(), discriminator.eval())
    if has_int8() and model.config["level"] == 4:
        seen = ImageSet((images * 255).byte(), torch.zeros(8, dtype=torch.int64), [""] * 8)
        exact = FrozenModel(model, discriminator)
        known = Quantization(list(_INT8_STAGES), observe_ranges(exact, seen), {})
        bundle.calibration = dataclasses.replace(_NO_CALIBRATION, quantization=known)
    return bundle


def _image_files(data: Path) -> list[str]:
    found = [path for path in find_files(data) if os.path.isfile(path)]
    files = [path for path in found if not path.lower().endswith(PACKED_SUFFIX)]
    if not files:
        raise ValueError(f"{str(data)!r} holds no image files; name a folder that does.")
    return files


def _readable(scorer: Scorer, files: list[str], count: int) -> list[str]:
    """Up to ``count`` readable files, evenly spaced over the list."""
    rows = list(screen(scorer, files[:: max(1, len(files) // count)][:count]))
    readable = [row.path for row in rows if row.error is None]
    if not readable:
        raise ValueError(f"no image can be read: {rows[0].error}")
    return readable


def _write_jpegs(folder: Path, count: int) -> list[str]:
    """Write grey JPEG files of smooth random fields, of the size of the published radiographs."""
    pillow = require("PIL.Image", "screen")
    generator = np.random.default_rng(0)
    files = [str(folder / f"{index:05}.jpeg") for index in range(count)]
    for path in files:
        coarse = pillow.fromarray(generator.integers(0, 256, (28, 28), dtype=np.uint8))
        smooth = coarse.resize((_JPEG_SIDE, _JPEG_SIDE), pillow.Resampling.BICUBIC)
        smooth.save(path, quality=90)
    return files


def _images(count: int, size: int) -> Tensor:
    """Smooth random fields [count, 1, size, size] in [0, 1], the same at every call."""
    coarse = torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
