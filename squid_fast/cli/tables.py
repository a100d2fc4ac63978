"""Results as tables for the terminal."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from ..experiments.ablation import SHOWN, cell, summarised
from ..inference.scores import PAPER_SCORE
from ..metrics import Evaluation

_narrow = partial(Table, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
_number = partial(Column, justify="right")


def evaluation_table(evaluations: dict[str, Evaluation]) -> Table:
    """The figures of ``evaluate``, one row for each score."""
    first = next(iter(evaluations.values()))
    rate = first.false_positive_rate
    names = ("AUROC", "95 %", "AUPR", "acc*", "F1*", "sens.", "spec.")
    table = _narrow(
        Column("score", no_wrap=True),
        *(_number(name, no_wrap=True) for name in names),
        title=f"{first.n_normal} normal, {first.n_anomalous} anomalous images",
        caption="acc*, F1*: at the threshold that is best on these very labels, which is the "
        "paper's protocol. sens., spec.: at the threshold set on normal validation images"
        + (f" for {rate:.0%} false positives." if rate else "."),
    )
    for name, e in evaluations.items():
        paper, own = e.paper_best_test_accuracy, e.calibrated
        low, high = e.auroc_interval
        figures = [e.auprc, paper.accuracy, paper.f1]
        figures += [own.sensitivity, own.specificity] if own else []
        cells = [f"{value:.3f}" for value in figures]
        table.add_row(name, f"{e.auroc:.3f}", f"{low:.2f}-{high:.2f}", *cells)
    return table


def demo_table(aurocs: dict[str, dict[str, float]], score: str) -> Table:
    """AUROC of every score for every kind of anomaly; ``score`` in bold."""
    kinds = map(_number, next(iter(aurocs.values())))
    title = "AUROC on unseen grids, against normal ones"
    table = Table("score", *kinds, title=title, box=SIMPLE_HEAD)
    for name, by_kind in aurocs.items():
        label = f"{name} (the paper's)" if name == PAPER_SCORE else name
        style = "bold" if name == score else ""
        table.add_row(label, *(f"{value:.3f}" for value in by_kind.values()), style=style)
    return table


def ablation_table(results: dict[str, Any]) -> Table:
    """AUROC of every variant of SQUID, and its difference from the full model."""
    table = _narrow(
        Column("variant", no_wrap=True),
        *map(_number, SHOWN),
        title=f"{results['settings']['preset']} on {results['settings']['data']}",
        caption="AUROC, mean over kinds of anomaly and seeds, ± deviation over seeds; in brackets "
        "the difference from the full SQUID.",
    )
    for row in summarised(results, SHOWN):
        table.add_row(row["variant"], *(cell(row, score) for score in SHOWN))
    return table


def bench_table(figures: dict[str, Any]) -> Table:
    """Speed of the published way and of squid_fast, from the figures of a ``Benchmark``."""
    rows = figures["screening"].values()
    share = next(row["share_of_scorer"] for row in rows if "share_of_scorer" in row)
    threads, rounds = figures["threads"], figures["rounds"]
    table = _narrow(
        "",
        *(_number(name, no_wrap=True) for name in ("images/s", "ms/image", "×", "× =")),
        title=f"{figures['device']}, {threads} thread{'s' * (threads != 1)}: {figures['model']}",
        caption=f"Medians of {rounds} rounds ({min(rounds, 3)} for files), in which all take "
        "turns. ×: how many times as fast as the published way; × =: at equal batch size. "
        f"From files to rows, squid_fast reaches {share:.0%} of its scorer's own rate. Threads "
        f"wait for one another as {figures['waiting']} has it; so do those of other Python "
        "programs that call squid_fast.utils.threads.limit_spinning() before importing torch.",
    )
    for part, title in (("evaluation", "model only"), ("screening", "end to end, from files")):
        table.add_row(title, style="bold")
        for name, row in figures[part].items():
            equal = row.get("ratio_at_equal_batch")
            table.add_row(
                name,
                f"{row['images_per_second']:,.1f}", f"{row['milliseconds']:,.2f}",
                f"{row['ratio']:.2f}", "" if equal is None else f"{equal:.2f}",
            )  # fmt: skip
        table.add_section()
    return table
