"""What SQUID is compared with, behind the same verbs: shallow methods and other networks."""

from ...utils.moved import moved_names
from .scorer import METHODS, BaselineScorer, load_scorer
from .training import RECIPE, MethodResult, train_method

__all__ = ["METHODS", "RECIPE", "BaselineScorer", "MethodResult", "load_scorer", "train_method"]

__getattr__ = moved_names(__name__, {"ComparisonScorer": f"{__name__}.BaselineScorer"})
