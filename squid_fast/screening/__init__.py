"""From image files to a table of results and a report for people.

    from squid_fast.screening import screen_to_table, write_report

    summary = screen_to_table(scorer, ["ward-3/", "extra/**/*.dcm"], "results.parquet")
    write_report("report.html", scorer, summary)

Until the table is written, rows are kept in a journal, from which a stopped run is resumed.
"""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names
from ..utils.moved import moved_names
from ..utils.text import utf8_text

if TYPE_CHECKING:
    from .journal import JournalError
    from .pipeline import ScreenRow, screen
    from .reading.files import find_files
    from .reading.lists import read_list
    from .reading.packing import Packed, pack
    from .report.report import write_report
    from .report.summary import Summary, summarise
    from .results import COLUMNS, write_table
    from .run import check_output, check_outputs, screen_to_table
else:
    _lazy, __dir__ = lazy_names(
        __name__,
        {
            "reading.files": ("find_files",),
            "journal": ("JournalError",),
            "reading.lists": ("read_list",),
            "reading.packing": ("Packed", "pack"),
            "pipeline": ("ScreenRow", "screen"),
            "report.report": ("write_report",),
            "results": ("COLUMNS", "write_table"),
            "run": ("check_output", "check_outputs", "screen_to_table"),
            "report.summary": ("Summary", "summarise"),
        },
    )
    __getattr__ = moved_names(
        __name__, {"check_folder": "squid_fast.utils.outputs.check_file"}, _lazy
    )

__all__ = [
    "COLUMNS",
    "JournalError",
    "Packed",
    "ScreenRow",
    "Summary",
    "check_output",
    "check_outputs",
    "find_files",
    "pack",
    "read_list",
    "screen",
    "screen_to_table",
    "summarise",
    "utf8_text",
    "write_report",
    "write_table",
]
