"""Chooses between tests and benchmarks: ``pytest`` runs tests/, ``pytest --benchmark`` bench/.

Options that take a value need their ``=`` (``--bench-results=bench/results``): pytest looks for its
configuration before it knows them, and would take a folder behind a space for one of tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from squid_fast.utils.threads import limit_spinning

limit_spinning()  # as the verbs do, before anything imports torch

BENCH = Path(__file__).parent / "bench"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the benchmarks, which pytest has to know before it sees bench/."""
    group = parser.getgroup("squid-fast benchmarks")
    group.addoption("--benchmark", action="store_true", help="run bench/ instead of tests/")
    group.addoption("--bench-device", help="cpu or cuda; a GPU if there is one")
    group.addoption(
        "--bench-sizes",
        choices=("tiny", "core", "all"),
        default="core",
        help="tiny: to try the benchmarks out; core: minutes; all: every published size, long",
    )
    group.addoption(
        "--bench-results",
        type=Path,
        default=Path(".benchmarks"),
        help="folder of micro_cpu.json or micro_cuda.json; bench/results is what documents show",
    )
    group.addoption(
        "--bench-seconds", type=float, default=float("inf"), help="skip what begins after that"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Look for benchmarks instead of tests, unless paths are named."""
    if config.option.benchmark and config.args_source is not config.ArgsSource.ARGS:
        config.args = [str(BENCH)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without ``--benchmark`` nothing of bench/ is collected, not even when it is named."""
    if config.option.benchmark or not collection_path.is_relative_to(BENCH):
        return None
    return True
