"""From image files to a result table and a report that a person can read.

    from squid_fast.screening import Summary, open_writer, screen, write_report

    summary = Summary()
    with open_writer("results.parquet") as writer:
        writer.write(summary.watch(screen(scorer, ["ward-3/", "extra/**/*.dcm"])))
    write_report("report.html", scorer, summary)

Rows stream from the files to the table; what the report needs is collected on the way.
"""

from squid_fast.screening.files import find_files
from squid_fast.screening.pipeline import ScreenRow, screen
from squid_fast.screening.plain import utf8_text
from squid_fast.screening.report import write_report
from squid_fast.screening.results import COLUMNS, ResultWriter, open_writer
from squid_fast.screening.summary import Summary, summarise

__all__ = [
    "COLUMNS",
    "ResultWriter",
    "ScreenRow",
    "Summary",
    "find_files",
    "open_writer",
    "screen",
    "summarise",
    "utf8_text",
    "write_report",
]
