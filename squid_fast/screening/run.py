"""A whole screening run, from inputs to a table, which can be stopped and resumed."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import closing
from pathlib import Path

from ..data.formats import IMAGE_SUFFIXES, is_image
from ..data.listing import LeftOut, counted
from ..utils.atomic import destination
from ..utils.outputs import check_distinct, check_file
from .journal import Journal, JournalError, Run
from .pipeline import ScorerLike, ScreenRow, screen_batches
from .reading.files import PathInput, as_paths, search_files
from .reading.pool import TIMEOUT
from .reading.source import Source
from .report.summary import Summary
from .results import table_writer, write_table

_INPUTS_SHOWN = 20
_LOOKED_AT = 4096
_MARKS = (b"z_score", b"<title>Radiograph screening report")  # Parquet has its columns at the end
_COMPARED = {
    "score_name": "score",
    "threshold": "threshold",
    "inputs_sha256": "inputs",
    "folder": "folder in which relative inputs start",
}

_log = logging.getLogger("squid_fast")


def screen_to_table(
    scorer: ScorerLike,
    inputs: PathInput | Iterable[PathInput],
    out: PathInput,
    *,
    resume: bool = False,
    batch_size: int = 32,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = _log.info,
) -> Summary | None:
    """Score every image in ``inputs`` into the table ``out``: one row per file, in their order.

    Until the table is whole, a table already at ``out`` stays, and rows are kept in the folder
    ``out`` + ``.partial``, so that a stopped run can be resumed without losing or doubling a row.
    If ``out`` is a link, all this holds for the file that it leads to.

    Args:
        inputs, batch_size, workers, timeout: see ``screen``; all but ``inputs`` may change when a
            run is resumed.
        out: the table, see ``write_table``.
        resume: continue an unfinished run of the same scorer and inputs, if there is one, with the
            files that were found when it was started.
        on_progress: called as ``on_progress(rows_done, rows_in_total)`` after every batch.
        should_stop: called after every batch; the run stops when it returns true.
        say: called with messages for the user, each one or more sentences.

    Returns:
        The figures of all rows, or None if ``should_stop`` ended the run.

    Raises:
        ValueError: ``out`` has an unknown suffix or is an image, or a number is out of range.
        OSError: ``out`` is a folder, or its folder is missing or cannot be written to.
        ImportError: ``out`` is Parquet and pyarrow is not installed.
        JournalError: there is an unfinished run and ``resume`` is not set, or it has another
            scorer or other inputs, or is in use; or the disk is full.
        Exception: whatever the scorer raises; the rows before can be resumed.

    >>> from types import SimpleNamespace
    >>> scorer = SimpleNamespace(image_size=32, score_name="l1", threshold=1.64, fingerprint="1")
    >>> summary = screen_to_table(scorer, "missing.png", "results.csv", workers=0)
    >>> summary.count, summary.errors
    (1, 1)
    """
    named = as_paths(inputs)
    check_output(out, resume=True)  # an unfinished run is refused below
    check_outputs({"out": out}, named)
    run = _describe(scorer, named)
    screen_batches(scorer, Source([]), batch_size, workers, timeout, 0)  # checks the arguments
    with Journal(_journal_folder(out)) as journal:
        if journal.run and not resume:
            raise _unfinished(out)
        if journal.run:
            _check_same(journal, journal.run, run)
            say(
                f"going on behind {journal.count:,} of {journal.total:,} rows; files that came "
                "after the run was started are not in it"
            )
        else:
            if resume:
                say(f"there is no unfinished run of {str(out)!r}: starting at the beginning")
            left_out = LeftOut()
            for path in journal.paths:
                left_out.keep(str(path))
            found = search_files(named, left_out)
            journal.start(run, found, lambda files: Source(files).packed, left_out)
            if journal.left_out:
                say(counted(journal.left_out))
        source = Source(journal.files)
        batches = screen_batches(scorer, source, batch_size, workers, timeout, journal.count)
        if not _score(batches, journal, on_progress, should_stop):
            say(
                f"stopped: {journal.count:,} of {journal.total:,} rows are safe in "
                f"{str(journal.folder)!r}; go on with --resume"
            )
            return None
        summary = Summary()
        summary.left_out = journal.left_out
        try:
            table = journal.folder / destination(out).name
            write_table(summary.watch(journal.rows()), out, table)
        except OSError as error:
            raise journal.failure(f"{str(out)!r} cannot be written", error) from error
        journal.remove()
    return summary


def check_output(out: PathInput, resume: bool = False) -> None:
    """Refuse what could not become the table of a run, before any work is done.

    Args:
        resume: whether an unfinished run of this table is to be continued.

    Raises:
        ValueError, OSError, ImportError, JournalError: as ``screen_to_table`` does.

    >>> check_output("results.xlsx")
    Traceback (most recent call last):
    ValueError: results are written as .parquet, .csv, .jsonl; 'results.xlsx' has the ...
    """
    table_writer(out)
    check_file(out)
    if not resume and _journal_folder(out).exists():
        with Journal(_journal_folder(out)) as journal:
            if journal.run:
                raise _unfinished(out)


def check_outputs(
    outputs: Mapping[str, PathInput | None], inputs: Collection[PathInput] = ()
) -> None:
    """Refuse files for results that cannot be written, are one file, or would replace an image.

    Nor may they replace another file in the folders that are searched for images, such as a table
    of labels, unless it is of results, too.

    Args:
        outputs: files by the name of their argument, the table first; None for those not wanted.
        inputs: what is screened, see ``find_files``.

    Raises:
        ValueError: two are the same file, or one is an input, any other image, or a file among the
            inputs that holds no results.
        OSError: see ``check_file`` of ``squid_fast.utils.outputs``.

    >>> check_outputs({"out": "results.csv", "report": "results.csv"})
    Traceback (most recent call last):
    ValueError: report is 'results.csv', the same file as out; name another.
    """
    table, *_ = outputs.values()
    assert table is not None
    journal = {"the folder of unfinished rows": _journal_folder(table)}
    check_distinct({**journal, **outputs}, {"the input": inputs})
    for name, path in outputs.items():
        if path is None:
            continue
        check_file(path)
        place = Path(path)
        if place.suffix.lower() in IMAGE_SUFFIXES or (place.is_file() and is_image(place)):
            raise ValueError(f"{name} is {str(path)!r}, an image; name another file for results.")
        if place.is_file() and _is_searched(place, inputs) and not _holds_results(place):
            raise ValueError(
                f"{name} is {str(path)!r}, a file among the inputs that holds no results of "
                "screening; name another."
            )


def _is_searched(file: Path, inputs: Collection[PathInput]) -> bool:
    """Whether a file lies in a folder that is an input, or in one in which a glob starts."""
    above = {os.path.realpath(folder) for folder in file.resolve().parents}
    for path in as_paths(inputs):
        if os.path.isdir(path):
            folder = path
        elif glob.has_magic(path):
            folder = re.split(r"[^/]*[*?[]", path, maxsplit=1)[0]
        else:
            continue
        if os.path.realpath(folder) in above:
            return True
    return False


def _holds_results(file: Path) -> bool:
    """Whether a file is empty, or a table, summary or report of an earlier run."""
    with open(file, "rb") as opened:
        head = opened.read(_LOOKED_AT)
        opened.seek(max(0, file.stat().st_size - _LOOKED_AT))
        return not head or any(mark in head + opened.read() for mark in _MARKS)


def _score(
    batches: Generator[list[ScreenRow], None, None],
    journal: Journal,
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Score the files that have no row yet; False if ``should_stop`` ended this."""
    on_progress(journal.count, journal.total)
    with closing(batches):
        for rows in batches:
            journal.append(rows)
            on_progress(journal.count, journal.total)
            if should_stop() and journal.count < journal.total:
                return False
    if journal.count != journal.total:
        raise JournalError(
            f"there are {journal.count:,} rows for {journal.total:,} images: a packed file became "
            f"shorter while it was read. Delete {str(journal.folder)!r} and start again."
        )
    return True


def _describe(scorer: ScorerLike, named: list[str]) -> Run:
    relative = any(not os.path.isabs(path) for path in named)
    return Run(
        scorer.fingerprint,
        scorer.score_name,
        float(scorer.threshold),
        named[:_INPUTS_SHOWN],
        hashlib.sha256("\0".join(named).encode("utf-8", "surrogatepass")).hexdigest(),
        os.getcwd() if relative else None,
    )


def _check_same(journal: Journal, was: Run, now: Run) -> None:
    """Refuse to mix rows of two runs in one table; the message names what differs."""
    parts = []
    if was.fingerprint != now.fingerprint and was.score_name == now.score_name:
        parts.append("the model, its calibration or the precision is not the same")
    for field, name in _COMPARED.items():
        if getattr(was, field) != getattr(now, field):
            field = field.removesuffix("_sha256")
            parts.append(f"the {name} was {getattr(was, field)!r} and is {getattr(now, field)!r}")
    if journal.packed != Source(journal.files).packed:
        parts.append("packed files among the inputs hold other numbers of images than they did")
    if parts:
        raise JournalError(
            f"{str(journal.folder)!r} is of another run: {'; '.join(parts)}. Resume it as it was "
            "started, or delete that folder to start again from the beginning."
        )


def _unfinished(out: PathInput) -> JournalError:
    return JournalError(
        f"{str(_journal_folder(out))!r} holds an unfinished run of {Path(out).name!r}: go on with "
        "--resume, or delete that folder to start again from the beginning"
    )


def _journal_folder(out: PathInput) -> Path:
    place = destination(out)  # of a link: on the file system of the table itself
    return place.with_name(place.name + ".partial")
