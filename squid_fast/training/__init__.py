"""Training: losses, the step, the loop, checkpoints."""

from .checkpoint import CheckpointError
from .contamination import check_apart, contaminated
from .loop import Progress, TrainingResult, learning_rate, train
from .run import load_splits, train_bundle
from .state import NonFiniteLossError
from .step import Trainer, make_optimizers

__all__ = [
    "CheckpointError",
    "NonFiniteLossError",
    "Progress",
    "Trainer",
    "TrainingResult",
    "check_apart",
    "contaminated",
    "learning_rate",
    "load_splits",
    "make_optimizers",
    "train",
    "train_bundle",
]
