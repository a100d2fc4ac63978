"""The report of a screening run for people, and the summary that it is made from."""

from .report import write_report
from .summary import Summary, summarise

__all__ = ["Summary", "summarise", "write_report"]
