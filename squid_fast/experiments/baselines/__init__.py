"""The baselines that SQUID is compared with: shallow methods and other networks, scored alike."""

from ...utils.moved import moved_names
from .scorer import METHODS, BaselineScorer, load_scorer
from .training import RECIPE, BaselineResult, train_baseline

__all__ = [
    "METHODS", "RECIPE", "BaselineResult", "BaselineScorer", "load_scorer", "train_baseline"
]  # fmt: skip

__getattr__ = moved_names(
    __name__,
    {
        "ComparisonScorer": f"{__name__}.BaselineScorer",
        "MethodResult": f"{__name__}.BaselineResult",
        "train_method": f"{__name__}.train_baseline",
    },
)
