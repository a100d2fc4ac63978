"""Fixtures of the benchmarks; the options are those of the conftest.py at the top."""

from __future__ import annotations

import time

import pytest
import torch

from bench.arguments import thread_count
from bench.operations.cases import schedule
from bench.operations.micro import Runner, Timings
from bench.operations.timing import DeviceClock
from squid_fast.utils.devices import choose_device

CLOCK = DeviceClock()


def _device(config: pytest.Config) -> torch.device:
    return choose_device(config.option.bench_device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contender"} <= set(metafunc.fixturenames):
        plan = schedule(_device(metafunc.config), metafunc.config.option.bench_sizes)
        ids = [f"{c.group} {who}".replace(" ", "-").replace("=", "") for c, who in plan]
        metafunc.parametrize(("case", "contender"), plan, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seconds = 0.01 if config.option.bench_sizes == "tiny" else 0.3
    how: dict[str, object] = {"max_time": seconds, "min_rounds": 5, "warmup": False}
    if _device(config).type == "cuda":
        how = {"timer": CLOCK}
    for item in items:
        item.add_marker(pytest.mark.benchmark(**how))
        # The reference, eager and compiled, may warn as it likes; results are verified.
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    torch.set_num_threads(thread_count())
    return _device(request.config)


@pytest.fixture(scope="session")
def timings(request: pytest.FixtureRequest, device: torch.device) -> Timings:
    return Timings(request.config.option.bench_results, device)


@pytest.fixture(scope="session")
def runner(device: torch.device) -> Runner:
    return Runner(device)


@pytest.fixture(scope="session")
def _started() -> float:
    return time.monotonic()


@pytest.fixture
def in_time(request: pytest.FixtureRequest, _started: float) -> bool:
    """Whether ``--bench-seconds`` are not over."""
    return time.monotonic() - _started <= request.config.option.bench_seconds
