"""What SQUID is compared with, behind the same verbs: shallow methods and other networks."""

from .scorer import METHODS, ComparisonScorer, load_scorer
from .training import RECIPE, MethodResult, train_method

__all__ = ["METHODS", "RECIPE", "ComparisonScorer", "MethodResult", "load_scorer", "train_method"]
