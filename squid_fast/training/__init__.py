"""Training: losses, the step, the loop, checkpoints."""

from ..utils.moved import moved_names
from .checkpoint import CheckpointError
from .loop import Progress, learning_rate
from .run import TrainingResult, load_splits, train, train_bundle
from .state import NonFiniteLossError
from .step import Trainer, make_optimizers

__all__ = [
    "CheckpointError", "NonFiniteLossError", "Progress", "Trainer", "TrainingResult",
    "learning_rate", "load_splits", "make_optimizers", "train", "train_bundle",
]  # fmt: skip

__getattr__ = moved_names(
    __name__,
    {
        "check_apart": "squid_fast.data.contamination.check_apart",
        "contaminated": "squid_fast.data.contamination.contaminated",
    },
)
