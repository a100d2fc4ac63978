"""Results as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..experiments.ablation import SHOWN, cell, summarised
from ..inference.scores import PAPER_SCORE
from ..metrics import Evaluation


def evaluation_table(evaluations: dict[str, Evaluation]) -> Table:
    """The figures of ``evaluate``, one row for each score."""
    first = next(iter(evaluations.values()))
    rate = first.false_positive_rate
    table = Table(
        title=f"{first.n_normal} normal, {first.n_anomalous} anomalous images",
        caption="acc*, F1*: at the threshold that is best on these very labels, which is the "
        "paper's protocol. sens., spec.: at the threshold set on normal validation images"
        + (f" for {rate:.0%} false positives." if rate else "."),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("score", no_wrap=True)
    for name in ("AUROC", "95 %", "AUPR", "acc*", "F1*", "sens.", "spec."):
        table.add_column(name, justify="right", no_wrap=True)
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
    table = Table(title="AUROC on unseen grids, against normal ones", box=SIMPLE_HEAD)
    table.add_column("score")
    for kind in next(iter(aurocs.values())):
        table.add_column(kind, justify="right")
    for name, by_kind in aurocs.items():
        label = f"{name} (the paper's)" if name == PAPER_SCORE else name
        style = "bold" if name == score else ""
        table.add_row(label, *(f"{value:.3f}" for value in by_kind.values()), style=style)
    return table


def ablation_table(results: dict[str, Any]) -> Table:
    """AUROC of every variant of SQUID, and its difference from the full model."""
    table = Table(
        title=f"{results['settings']['preset']} on {results['settings']['data']}",
        caption="AUROC, mean over kinds of anomaly and seeds, ± deviation over seeds; in brackets "
        "the difference from the full SQUID.",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("variant", no_wrap=True)
    for score in SHOWN:
        table.add_column(score, justify="right")
    for row in summarised(results, SHOWN):
        table.add_row(row["variant"], *(cell(row, score) for score in SHOWN))
    return table


def bench_table(figures: dict[str, Any]) -> Table:
    """Speed of the published way and of squid_fast, from the figures of a ``Benchmark``."""
    share = next(r["share_of_scorer"] for r in figures["screening"].values() if len(r) > 4)
    threads, rounds = figures["threads"], figures["rounds"]
    table = Table(
        title=f"{figures['device']}, {threads} thread{'s' * (threads != 1)}: {figures['model']}",
        caption=f"Medians of {rounds} rounds ({min(rounds, 3)} for files), in which all take "
        "turns. ×: how many times as fast as the published way; × =: at equal batch size. "
        f"From files to rows, squid_fast reaches {share:.0%} of its scorer's own rate. Threads "
        f"wait for one another as {figures['waiting']} has it; so do those of other Python "
        "programs that call squid_fast.utils.threads.limit_spinning() before importing torch.",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("")
    for name in ("images/s", "ms/image", "×", "× ="):
        table.add_column(name, justify="right", no_wrap=True)
    for part, title in (("evaluation", "model only"), ("screening", "end to end, from files")):
        table.add_row(title, style="bold")
        for name, row in figures[part].items():
            equal = row.get("ratio_at_equal_batch")
            table.add_row(
                name,
                f"{row['images_per_second']:,.1f}",
                f"{row['milliseconds']:,.2f}",
                f"{row['ratio']:.2f}",
                "" if equal is None else f"{equal:.2f}",
            )
        table.add_section()
    return table
