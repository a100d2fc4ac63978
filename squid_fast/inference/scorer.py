"""A trained model as a scorer: images in, calibrated anomaly scores out (paper section 3.4)."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..data import ImageSet
from ..metrics import Evaluation, evaluate
from ..modules import SQUID, Discriminator, discriminator_size
from ..utils.arguments import check_kind
from ..utils.checkpoints import unwrapped
from ..utils.devices import Backend, ScoringPrecision, choose_device, without_autocast
from .bundle import load_bundle
from .model import BATCH, FrozenModel
from .precision import check_hardware, choose_scoring_precision
from .program import trace
from .scores import PAPER_SCORE, SCORES, Calibration, ScoreCalibration, raw_scores, z_score


@dataclass(frozen=True)
class Scores:
    """Scores of a batch, float32 on the CPU.

    Attributes:
        raw: [B], in the unit of the score.
        z_score: [B], standard deviations from the mean of normal training images; greater is
            less normal. Rank by this one.
        anomaly_score: [B], the paper's, ``sigmoid(z_score)``: 1 is anomalous. In float32 it
            saturates and ties where z_score does not.
        reconstruction: [B, 1, H, W], where asked for.

    >>> z_score = torch.tensor([-1.0, 0.0, 2.0])
    >>> Scores(-z_score, z_score, torch.sigmoid(z_score)).anomaly_score
    tensor([0.2689, 0.5000, 0.8808])
    """

    raw: Tensor
    z_score: Tensor
    anomaly_score: Tensor
    reconstruction: Tensor | None = None


class BaseScorer(ABC):
    """Calibrated scores by whatever method ``measure`` measures images with.

    Args:
        score: name of the score of ``score``, one of ``score_names``, which ``measure`` knows.
        calibration: of the scores; without one only ``raw_scores`` can be used.
    """

    batch_size = BATCH  # of a whole set

    def __init__(
        self,
        score: str,
        score_names: Collection[str],
        image_size: int,
        precision: str,
        device: torch.device,
        calibration: Calibration | None,
    ) -> None:
        self.score_name, self.score_names, self.image_size = score, tuple(score_names), image_size
        self.precision, self.device, self.calibration = precision, device, calibration

    @abstractmethod
    def measure(
        self, images: Tensor, names: Collection[str], reconstruction: bool = True
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Raw scores [B] by name, on the CPU, and reconstructions of images, see ``score``.

        Without ``reconstruction`` they may be left out.
        """

    @property
    def threshold(self) -> float:
        """On the z-score: an image is flagged when its z-score exceeds it."""
        return self.calibration_of().threshold

    @property
    def false_positive_rate(self) -> float:
        """Share of normal validation images at which ``threshold`` was set."""
        return self.calibration_of().false_positive_rate

    @property
    def reference_z(self) -> list[float]:
        """z-scores of the normal images that gave the threshold."""
        return self.calibration_of().reference_z

    def prefetch(self, images: Tensor) -> Tensor:
        """Images for ``score``, on their way to a GPU while it computes; on a CPU as they are."""
        return images

    def score(self, images: Tensor, reconstruction: bool = False) -> Scores:
        """Scores of images [B, 1, S, S]: float in [0, 1], or uint8, of which 255 is 1.

        Raises:
            ValueError: images of another shape, dtype or range of values, or no calibration.
        """
        self.calibration_of()
        values, recon = self.measure(images, (self.score_name,), reconstruction)
        raw = values[self.score_name]
        z = self.z_score(self.score_name, raw)
        shown = recon.cpu() if reconstruction and recon is not None else None
        return Scores(raw, z, torch.sigmoid(z), shown)

    def raw_scores(
        self, images: ImageSet, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Raw values [n] of several scores at once, of all unless named.

        Without a calibration there is no "patch_error".
        """
        check_kind("images", images, ImageSet)
        names = self.score_names if names is None else [names] if isinstance(names, str) else names
        for name in names:
            if name not in self.score_names:
                raise ValueError(
                    f"score is {name!r}; it must be one of {', '.join(self.score_names)}."
                )
        batches = images.batches(self.batch_size) if len(images) else [images.batch([])]
        parts = [self.measure(batch, names, False)[0] for batch in batches]
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def evaluate(self, images: ImageSet) -> tuple[dict[str, Evaluation], dict[str, np.ndarray]]:
        """Figures of every score on labelled images, and the z-scores [n] they are made of.

        Raises:
            ValueError: images of unknown label or of one class only, or no calibration.
        """
        known = self.calibration.scores if self.calibration else self.score_names
        raw = self.raw_scores(images, [name for name in self.score_names if name in known])
        z = {name: self.z_score(name, values).numpy() for name, values in raw.items()}
        labels, evaluations = images.labels.numpy(), {}
        for name, values in z.items():
            own = self.calibration_of(name)
            rate = own.false_positive_rate
            evaluations[name] = evaluate(
                labels, values, score_name=name, threshold=own.threshold, false_positive_rate=rate
            )
        return evaluations, z

    def z_score(self, name: str, raw: Tensor) -> Tensor:
        """z-scores [B], float32, of raw values, oriented so that greater is less normal."""
        own = self.calibration_of(name)
        return z_score(name, raw, own.mean, own.std)

    def calibration_of(self, name: str | None = None) -> ScoreCalibration:
        """The calibration of a score, of its own unless named; ValueError if there is none."""
        if self.calibration is None:
            raise ValueError(
                "this scorer has no calibration, so there are no z-scores and no threshold; "
                "`squid-fast train`, `squid-fast convert --data` and squid_fast.calibrate make one."
            )
        name = name or self.score_name
        if name not in self.calibration.scores:
            raise ValueError(
                f"the calibration of this bundle lacks {name!r}: it is older than that score and "
                f"has {', '.join(self.calibration.scores)}."
            )
        return self.calibration.scores[name]


class Scorer(BaseScorer):
    """Scores images with a trained generator and discriminator.

    Built once: both are copied into the form that evaluation runs fastest in (no teacher, batch
    norm folded into convolutions, memory slots projected), so that later changes of the modules
    do not reach the scorer. The score of an image does not depend on the images beside it.

    Args:
        calibration: as from ``calibrate``; without one only ``raw_scores`` can be used.
        score: one of ``SCORES``.
        precision: of the convolutions, everything else being float32. "float32"; "bf16"; "int8",
            in which those stages are quantized that the calibration found to keep the ranking (on
            CPUs with VNNI, for a calibration made on one), the others in bf16 where the hardware
            has it; "auto": on a CPU int8 where it ranks as float32 does (``AGREEMENT``), else bf16
            where the hardware has it. Scores differ a little between precisions. float32 is
            computed in float32 on a GPU too, never in TF32.
        device: "cpu", "cuda", ...; a GPU if there is one unless given.
        backend: "eager", or "compile", which has ``torch.compile`` join what lies between our
            kernels. It needs Triton or, on a CPU, a C++ compiler, compiles for a minute or so at
            the first batch of each size, and knows no int8. ``squid-fast bench --backend compile``
            measures both; scores differ a little between them.

    Raises:
        ValueError: no such score, precision, device or backend; or this machine does not compute
            in it.

    >>> from squid_fast import calibrate
    >>> model = SQUID(1, 8, 3, level=2, memory_channel=200, ops=["none", "none"])
    >>> images = torch.randint(0, 256, (20, 1, 40, 40), dtype=torch.uint8)
    >>> normal = ImageSet(images, torch.zeros(20, dtype=torch.int64), [""] * 20)
    >>> calibration = calibrate(model, Discriminator(2), normal, device="cpu")
    >>> scorer = Scorer(model, Discriminator(2), calibration, "patch_error", device="cpu")
    >>> (scorer.score(images).z_score > scorer.threshold).sum()  # 5% of the normal images
    tensor(1)
    """

    def __init__(
        self,
        model: SQUID,
        discriminator: Discriminator,
        calibration: Calibration | None = None,
        score: str = PAPER_SCORE,
        precision: ScoringPrecision = "auto",
        device: str | torch.device | None = None,
        backend: Backend = "eager",
    ) -> None:
        model, discriminator = checked_pair(model, discriminator)
        if score not in tuple(SCORES):
            raise ValueError(f"score is {score!r}; it must be one of {', '.join(SCORES)}.")
        if calibration is not None:
            check_kind("calibration", calibration, Calibration)
            count = len(calibration.patch_mean)
            if count not in (0, model.num_patch**2):
                raise ValueError(
                    f"the calibration is of a model with {count} patches, but this one has "
                    f"{model.num_patch**2}; squid_fast.calibrate makes one for it."
                )
        where = choose_device(device)
        chosen = choose_scoring_precision(precision, where, calibration, score, backend)
        known = SCORES if calibration else [name for name in SCORES if name != "patch_error"]
        super().__init__(score, known, model.image_size, chosen, where, calibration)
        quantization = calibration.quantization if calibration else None
        self.backend = backend
        self.model = FrozenModel(model, discriminator, chosen, where, quantization, backend)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        score: str | None = None,
        precision: ScoringPrecision = "auto",
        device: str | torch.device | None = None,
        backend: Backend = "eager",
    ) -> Scorer:
        """The scorer of a bundle folder; its configured score unless another is named.

        Raises:
            BundleError: the folder is no bundle, or damaged; ValueError as of the constructor.
        """
        check_hardware(precision, choose_device(device), backend)
        loaded = load_bundle(bundle)
        pair, score = (loaded.model, loaded.discriminator), score or loaded.score
        return cls(*pair, loaded.calibration, score, precision, device, backend)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that scores depend on, to the bit: rows of two must not be mixed."""
        calibration = self.calibration and self.calibration.to_json()
        about = [self.model.config, calibration, self.score_name, self.precision]
        if self.backend != "eager":
            about.append(self.backend)
        return fingerprint(self.model.weights(), about)

    def prefetch(self, images: Tensor) -> Tensor:
        return self.model.prefetch(images)

    def measure(
        self, images: Tensor, names: Collection[str], reconstruction: bool = True
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        measured, recon = self.model.measure(images, names, reconstruction)
        return raw_scores(names, *measured, self.calibration), recon

    def to_torch_export(self) -> ExportedProgram:
        """The scorer as a program of ATen operations alone, which runs without squid_fast.

        It takes images float32 [B, 1, H, W] in [0, 1] for any B from 1 on, and returns raw score,
        z-score and anomaly score, each [B], and the reconstruction [B, 1, H, W]. Images are not
        checked: NaN or infinite pixels give NaN, for their own image alone, and values outside
        [0, 1] give scores that mean nothing.

        Raises:
            ValueError: no calibration, or a scorer that is not in float32 on the CPU.
        """
        if self.precision != "float32" or self.device.type != "cpu":
            raise ValueError(
                f"this scorer computes in {self.precision} on {self.device}, but a graph is made "
                "of float32 weights on the CPU: Scorer.load(bundle, precision='float32', "
                "device='cpu') has them."
            )
        self.calibration_of()  # raises without one
        assert self.calibration is not None
        with without_autocast(self.device):
            return trace(self.model, self.score_name, self.calibration)


def checked_pair(model: nn.Module, discriminator: nn.Module) -> tuple[SQUID, Discriminator]:
    """A generator and a discriminator that fit, without what wraps them, such as torch.compile.

    Raises:
        TypeError: a module is of another type; ValueError: they do not fit, or hold no values.
    """
    model, discriminator = unwrapped(model), unwrapped(discriminator)
    check_kind("model", model, SQUID)
    check_kind("discriminator", discriminator, Discriminator)
    assert isinstance(model, SQUID)
    assert isinstance(discriminator, Discriminator)
    if any(
        value.is_meta for part in (model, discriminator) for value in part.state_dict().values()
    ):
        raise ValueError("a module is on the meta device, without values; load its weights first.")
    fitting = discriminator_size(model.image_size)
    if discriminator.size != fitting:
        raise ValueError(
            f"the discriminator is a Discriminator({discriminator.size}); for images of "
            f"{model.image_size} pixels a Discriminator({fitting}) would fit."
        )
    return model, discriminator


def fingerprint(weights: Iterable[tuple[str, Tensor]], about: object, method: str = "") -> str:
    """Hash of a method's name, its named tensors, and what else can be written as JSON."""
    digest = hashlib.sha256(method.encode())
    for name, value in weights:
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()
