"""The report that a person reads, and the summary it is made of."""

from .report import write_report
from .summary import Summary, summarise

__all__ = ["Summary", "summarise", "write_report"]
