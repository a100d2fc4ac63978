"""Speed of every operation: ``pytest --benchmark``, ``-k "memory_lookup and not compiled"``.

A group is one operation, direction, dtype and set of sizes; its members are the contenders. Times
and file are those of ``python -m bench operations``; pytest-benchmark shows, saves and compares
them. With ``--benchmark-disable`` contenders are compiled and verified, but not timed.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.arguments import thread_count
from bench.operations.cases import Case, schedule
from bench.operations.micro import OutOfTimeError, Timings
from squid_fast.utils.devices import choose_device


class DeviceClock:
    """A clock that is set by hand, from which pytest-benchmark reads what has been measured."""

    now = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


CLOCK = DeviceClock()
# The reference, eager and compiled, may warn as it likes; results are verified.
pytestmark = [pytest.mark.benchmark(timer=CLOCK), pytest.mark.filterwarnings("default")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    plan = schedule(choose_device(options.bench_device), options.bench_sizes)
    ids = [f"{case.group} {who}".replace(" ", "-").replace("=", "") for case, who in plan]
    metafunc.parametrize(("case", "contender"), plan, ids=ids)


@pytest.fixture(scope="module")
def timings(request: pytest.FixtureRequest) -> Timings:
    torch.set_num_threads(thread_count())
    options = request.config.option
    device = choose_device(options.bench_device)
    return Timings(device, options.bench_results, options.bench_seconds)


def test_speed(case: Case, contender: str, timings: Timings, benchmark: BenchmarkFixture) -> None:
    benchmark.group = case.group
    if benchmark.disabled:
        call, _ = timings.prepare(case, contender)
        benchmark(call)
        return
    try:
        row, seconds = timings.measure(case, contender)
    except OutOfTimeError as late:
        pytest.skip(str(late))
    times = iter(seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(times)), rounds=len(seconds))
    benchmark.extra_info.update(row)
