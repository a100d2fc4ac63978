"""Screening on many machines through Ray Data."""

from .ray import gather_table, score_dataset, screen_with_ray

__all__ = ["gather_table", "score_dataset", "screen_with_ray"]
