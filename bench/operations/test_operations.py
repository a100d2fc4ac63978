"""Speed of every operation: ``pytest --benchmark``, ``-k "memory_lookup and not compiled"``.

A group is one operation, direction, dtype and set of sizes; its members are the contenders. With
``--benchmark-disable`` contenders are compiled and verified, but not timed.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.operations import timing
from bench.operations.cases import Case
from bench.operations.conftest import CLOCK
from bench.operations.micro import Runner, Timings


def test_speed(
    case: Case,
    contender: str,
    device: torch.device,
    runner: Runner,
    timings: Timings,
    in_time: bool,
    benchmark: BenchmarkFixture,
) -> None:
    if not in_time:
        timings.fail(case, contender, "skipped: the time was up")
        pytest.skip("the time was up")
    benchmark.group = case.group
    try:
        call, error = runner.prepare(case, contender)
        if benchmark.disabled:
            benchmark(call)
            return
        if device.type == "cuda":
            timed = timing.on_cuda(call)
            times = iter(timed.warm)
            benchmark.pedantic(lambda: CLOCK.advance(next(times, 0.0)), rounds=len(timed.warm))
        else:
            benchmark(call)
            timed = timing.Timing(list(benchmark.stats.stats.data), [])
    except Exception as failure:
        timings.fail(case, contender, failure)
        raise
    benchmark.extra_info.update(timings.add(case, contender, error, timed))
