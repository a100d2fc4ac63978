"""Threads: how they wait, how many, and that a run keeps its number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from squid_fast.experiments.baselines import train_baseline
from squid_fast.training import loop, train
from squid_fast.training.checkpoint import load_checkpoint
from squid_fast.utils import threads as module
from squid_fast.utils.threads import SPIN, fastest_threads, limit_spinning, threads, waiting
from tests.factories import image_set
from tests.training.test_training import RECIPE, after_steps, assert_same_pair, tiny_model

pytest.importorskip("lightning_fabric")

# Prints how threads are to wait when something first imports torch, and ends there.
AT_TORCH = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"))
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", *SPIN):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unset")
def test_the_environment_decides_where_it_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waiting() == "as OpenMP does by itself"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert waiting() == f"GOMP_SPINCOUNT=7 KMP_BLOCKTIME={SPIN['KMP_BLOCKTIME']}"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delenv("KMP_BLOCKTIME")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    limit_spinning()
    assert waiting() == "OMP_WAIT_POLICY=active"


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(
    "program",
    [
        "sys.argv = ['squid-fast', 'bench']; from squid_fast.__main__ import main; main()",
        "import bench.scoring.speed",
    ],
)
def test_programs_say_how_threads_wait_before_torch_is_imported(program: str) -> None:
    command, root = [sys.executable, "-c", AT_TORCH + program], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == list(SPIN.values())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("seconds", "expected", "tried"),
    [
        ({8: 1.0, 4: 0.8, 2: 0.9, 1: 0.1}, 4, [8, 4, 2]),  # not further than it gets faster
        ({8: 0.3, 4: 0.5, 2: 0.9, 1: 1.7}, 8, [8, 4]),
        ({2: 15.0, 1: 0.2}, 1, [2, 1]),
        ({3: 0.2, 1: 0.1}, 1, [3, 1]),
        ({1: 0.2}, 1, [1]),
    ],
)
def test_the_number_with_which_a_step_is_fastest(
    seconds: dict[int, float], expected: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seen = [0.0], []
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def step() -> None:
        count = torch.get_num_threads()
        first = count not in seen
        if first:
            seen.append(count)
        clock[0] += 100.0 if first else seconds[count]  # the first step prepares much

    before = torch.get_num_threads()
    assert fastest_threads(step, max(seconds)) == expected
    assert seen == tried
    assert torch.get_num_threads() == before


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says that it computes with two threads, and goes on computing with one."""
    count = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: count.__setitem__(0, n))


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What timing is going to find, in turn; asking for more is an error."""
    found: list[int] = []

    def choose(step: object, most: int) -> int:
        assert most == 2
        return found.pop(0)

    monkeypatch.setattr(loop, "fastest_threads", choose)
    monkeypatch.setattr(loop, "WORTH_TIMING", 6)
    return found


@pytest.mark.usefixtures("two_threads")
def test_a_run_that_is_resumed_keeps_its_number(tmp_path: Path, fastest: list[int]) -> None:
    images = image_set(12)
    fastest.append(1)
    first = train(tiny_model(), images, tmp_path, RECIPE, should_stop=after_steps(2))
    assert (first.threads, fastest) == (1, [])
    assert load_checkpoint(tmp_path / "checkpoint.pt")["threads"] == 1
    assert torch.get_num_threads() == 2
    resumed = train(tiny_model(), images, tmp_path, RECIPE, resume=True)
    assert (resumed.threads, resumed.finished) == (1, True)


@pytest.mark.usefixtures("two_threads")
def test_steps_are_timed_where_it_brings_something(tmp_path: Path, fastest: list[int]) -> None:
    images, out = image_set(12), iter(tmp_path / str(n) for n in range(9))
    with threads(1):  # there is no choice
        assert train(tiny_model(), images, next(out), RECIPE).threads == 1
    assert train(tiny_model(), images, next(out), RECIPE, thread_count=1).threads == 1
    few = image_set(4)  # three steps in all
    assert train(tiny_model(), few, next(out), RECIPE).threads == 2
    fastest.append(2)
    assert train(tiny_model(), images, next(out), RECIPE).threads == 2


@pytest.mark.usefixtures("two_threads")
def test_timing_leaves_no_trace_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.01)
    monkeypatch.setattr(loop, "WORTH_TIMING", 6)
    images, calls = image_set(12), []

    def timed(step: object, most: int) -> int:
        calls.append(fastest_threads(step, most))
        return 1

    monkeypatch.setattr(loop, "fastest_threads", timed)
    chosen = train(tiny_model(), images, tmp_path / "chosen", RECIPE)
    given = train(tiny_model(), images, tmp_path / "given", RECIPE, thread_count=1)
    assert len(calls) == 1
    assert calls[0] in (1, 2)
    assert_same_pair(given, chosen)


@pytest.mark.usefixtures("two_threads")
def test_what_squid_is_compared_with_keeps_its_number_too(
    tmp_path: Path, fastest: list[int]
) -> None:
    images, options = image_set(24), {"recipe": RECIPE, "device": "cpu"}
    fastest.append(1)
    stop = after_steps(2)
    first = train_baseline("autoencoder", images, tmp_path, should_stop=stop, **options)
    assert (first.finished, fastest) == (False, [])
    assert train_baseline("autoencoder", images, tmp_path, resume=True, **options).finished
    about = json.loads((tmp_path / "config.json").read_text())["about"]
    assert about["machine"]["threads"] == 1
