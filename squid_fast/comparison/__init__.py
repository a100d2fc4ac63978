"""What SQUID is compared with, behind the same verbs: shallow methods and other networks."""

from .scorer import METHODS, ComparisonScorer, load_scorer
from .training import RECIPE, train_method

__all__ = ["METHODS", "RECIPE", "ComparisonScorer", "load_scorer", "train_method"]
