"""From image files to a result table and a report that a person can read.

    from squid_fast.screening import screen_to_table, write_report

    summary = screen_to_table(scorer, ["ward-3/", "extra/**/*.dcm"], "results.parquet")
    write_report("report.html", scorer, summary)

Rows go from the files to a journal beside the table, from which a run that was stopped or killed
can be resumed; the table and what the report needs are made of it at the end.
"""

from typing import TYPE_CHECKING

from squid_fast._lazy import lazy_names

if TYPE_CHECKING:
    from squid_fast.screening.files import find_files
    from squid_fast.screening.journal_format import JournalError
    from squid_fast.screening.lists import read_list
    from squid_fast.screening.packing import Packed, pack
    from squid_fast.screening.pipeline import ScreenRow, screen
    from squid_fast.screening.plain import utf8_text
    from squid_fast.screening.report import write_report
    from squid_fast.screening.results import COLUMNS, write_table
    from squid_fast.screening.run import check_folder, check_output, screen_to_table
    from squid_fast.screening.summary import Summary, summarise
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "files": ("find_files",),
            "journal_format": ("JournalError",),
            "lists": ("read_list",),
            "packing": ("Packed", "pack"),
            "pipeline": ("ScreenRow", "screen"),
            "plain": ("utf8_text",),
            "report": ("write_report",),
            "results": ("COLUMNS", "write_table"),
            "run": ("check_folder", "check_output", "screen_to_table"),
            "summary": ("Summary", "summarise"),
        },
    )

__all__ = [
    "COLUMNS",
    "JournalError",
    "Packed",
    "ScreenRow",
    "Summary",
    "check_folder",
    "check_output",
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
