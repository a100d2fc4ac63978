"""Puts measured figures into README.md: ``python -m bench.readme``.

Each table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->`` and is made from a file
under ``bench/results/``; ``--check`` only says whether the README is up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def speed() -> str:
    """The published way beside squid_fast."""
    figures = json.loads((RESULTS / "speed_cpu.json").read_text())
    lines = ["| | images/s | ratio |", "|---|--:|--:|"]
    for part in ("evaluation", "training"):
        for name, row in figures[part].items():
            lines.append(
                f"| {part}: {name} | {row['images_per_second']:.1f} | {row['ratio']:.1f} × |"
            )
    lines += [
        "",
        f"{figures['threads']} cores ({figures['device']}), {figures['precision']}, torch "
        f"{figures['torch']}, medians of {figures['rounds']} interleaved rounds.",
    ]
    return "\n".join(lines)


def demo() -> str:
    """AUROC of every score for every kind of anomaly, from the demo."""
    figures = json.loads((RESULTS / "demo.json").read_text())
    kinds = list(next(iter(figures["aurocs"].values())))
    lines = ["| score | " + " | ".join(kinds) + " |", "|---|" + "--:|" * len(kinds)]
    for name, by_kind in figures["aurocs"].items():
        label = f"`{name}`" + (" (the paper's)" if name == figures["paper_score"] else "")
        lines.append(f"| {label} | " + " | ".join(f"{by_kind[k]:.2f}" for k in kinds) + " |")
    each = figures["screened"]["count"] // (len(kinds) + 1)
    lines += [
        "",
        f"{figures['trained_grids']} normal grids in {figures['training_seconds']:.0f} s of "
        f"training, one seed; {each} unseen normal grids against {each} of each kind.",
    ]
    return "\n".join(lines)


def trials() -> str:
    """What was tried for the small preset."""
    figures = json.loads((RESULTS / "demo_trials.json").read_text())
    score, paper = "patch_error", "discriminator_instance"
    kinds = list(next(iter(figures["trials"].values()))["auroc"][score])
    head = ["variant", "grids seen", *kinds, "paper's score"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for name, trial in figures["trials"].items():
        own = [f"{trial['auroc'][score][kind]:.2f}" for kind in kinds]
        published = (
            f"{min(trial['auroc'][paper].values()):.2f}-{max(trial['auroc'][paper].values()):.2f}"
        )
        lines.append(
            "| "
            + " | ".join([f"{name}: {trial['about']}", str(trial["grids"]), *own, published])
            + " |"
        )
    lines += ["", f"AUROC of `{score}`, {figures['seconds']:.0f} s of training each."]
    return "\n".join(lines)


TABLES = {"speed": speed, "demo": demo, "trials": trials}


def fill(text: str) -> str:
    """The text with every marked table made anew."""
    pattern = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)


def main() -> None:
    """Rewrite the pages, or with ``--check`` exit with 1 if that would change one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = False
    for page in (ROOT / "README.md", RESULTS / "README.md"):
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        stale |= filled != text
        if not options.check:
            page.write_text(filled, encoding="utf-8")
    if options.check and stale:
        print("figures in README.md are out of date: run python -m bench.readme", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
