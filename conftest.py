"""The choice between tests and benchmarks, which ``pytest --benchmark`` runs.

Options that take a value need their ``=``, as in ``--bench-results=bench/results``: pytest looks
for its configuration before it knows them, and would take a folder after a space for one of tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from squid_fast.utils.threads import limit_spinning

limit_spinning()  # as the verbs do, before anything imports torch

BENCH = Path(__file__).parent / "bench"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmarks, which pytest has to know before it collects any."""
    group = parser.getgroup("squid-fast benchmarks")
    group.addoption("--benchmark", action="store_true", help="Benchmarks, in place of tests.")
    group.addoption("--bench-device", help="Device, cpu or cuda. Default: the GPU if there is one.")
    group.addoption(
        "--bench-sizes",
        choices=("tiny", "core", "all"),
        default="core",
        help="Sizes: tiny ones for a trial, core ones for minutes, all published ones for longer. "
        "Default: core.",
    )
    group.addoption(
        "--bench-results",
        type=Path,
        default=Path(".benchmarks"),
        help="Folder of micro_cpu.json or micro_cuda.json; documents show those in bench/results. "
        "Default: .benchmarks.",
    )
    group.addoption(
        "--bench-seconds",
        type=float,
        default=float("inf"),
        help="Time after which nothing more is begun. Default: none.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect benchmarks in place of tests, unless paths are given."""
    if config.option.benchmark and config.args_source is not config.ArgsSource.ARGS:
        config.args = [str(BENCH)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without ``--benchmark``, collect nothing of ``bench``, even if its path is given."""
    if config.option.benchmark or not collection_path.is_relative_to(BENCH):
        return None
    return True
