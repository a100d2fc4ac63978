"""The benchmark room: what it counts, what it refuses, and that it stays out of the tests' way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import squid_fast
from bench import measurements, pages
from bench.__main__ import COMMANDS, main
from bench.accuracy.runs import together
from bench.measurements import Results, commit
from bench.operations import micro, roofline, timing
from bench.operations.cases import Case, cases, schedule
from bench.operations.micro import Timings
from bench.operations.problems import WrongResultError as Wrong
from bench.operations.problems import call_of, function_of, problem
from bench.operations.roofline import Ceilings, Work
from bench.operations.verify import verify
from bench.scoring import stages, threads
from squid_fast.experiments.benchmark import random_bundle
from squid_fast.inference.scores import PAPER_SCORE
from squid_fast.metrics import evaluate
from squid_fast.presets import PRESETS
from squid_fast.utils import machine
from tests.factories import image_set

CPU = torch.device("cpu")
SLOTS_LEARNED = ("memory_lookup", "forward_backward_slots")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results in place of the repository's."""
    monkeypatch.setattr(measurements, "RESULTS", tmp_path)
    return tmp_path


def pytest_in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    how = {"cwd": measurements.ROOT, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=120, **how)


def tiny(operation: str, direction: str = "forward") -> Case:
    found = [c for c in cases(CPU, "tiny") if (c.operation, c.direction) == (operation, direction)]
    return found[0]


def test_roofline_of_a_convolution_by_hand() -> None:
    # 2 images of 4 x 4: 32 pixels of 3 channels, 9 * 3 * 5 weights, 32 pixels of 5 channels.
    sizes = {"B": 2, "C": 3, "D": 5, "side": 4, "e": 2}
    plain = roofline.cell_convolution(**sizes, resized=False, behind="nothing")
    assert plain == Work(2 * (96 + 135 + 160), 2 * 32 * 135)
    # A residual is read; with a head one number in float32 is written for each pixel.
    headed = roofline.cell_convolution(**sizes, resized=False, behind="residual, head")
    assert headed == Work(2 * (96 + 135 + 160) + 4 * 32, 2 * 32 * (135 + 5))
    # The result has four times the pixels.
    resized = roofline.cell_convolution(**sizes, resized=True, behind="nothing")
    assert resized == Work(2 * (96 + 135 + 640), 2 * 128 * 135)


def test_roofline_of_a_lookup_by_hand() -> None:
    # Query and answer of 2 images, 3 patches, 5 wide: 30 numbers each; memory 3 x 7 x 5 = 105.
    # Scores: 2 * 3 * 7 dot products of 5: 210 multiplications; two kept rows: 2 * 3 * 2 * 5 = 60.
    assert roofline.memory_lookup(2, 3, 7, 5, 3, 4) == Work(4 * 165, 2 * 270)
    # Backward: gradient, query, memory in, query's gradient out; two products over all slots.
    both = roofline.memory_lookup(2, 3, 7, 5, 3, 4, backward=True)
    assert both == Work(4 * (165 + 195), 2 * (270 + 420))
    # Gradient of the memory: one more output, through the scores and through the answer.
    slots = roofline.memory_lookup(2, 3, 7, 5, 3, 2, backward=True, slots=True)
    assert slots == Work(2 * (165 + 195 + 105), 2 * (270 + 420 + 270))


def test_roofline_of_the_other_operations_by_hand() -> None:
    assert roofline.gumbel_shrinkage(2, 3, 7, 2) == Work(2 * 2 * 42, 4 * 42)
    assert roofline.gumbel_shrinkage(2, 3, 7, 2, backward=True) == Work(5 * 2 * 42, 12 * 42)
    # 2 x 3 x 4 x 5 = 120 elements: one read, one written; backward one read, two written.
    assert roofline.masked_shortcut(2, 3, 4, 5, 4) == Work(2 * 4 * 120, 0)
    assert roofline.masked_shortcut(2, 3, 4, 5, 4, backward=True) == Work(5 * 4 * 120, 0)
    affine = roofline.masked_shortcut(2, 3, 4, 5, 4, affine=True, backward=True)
    assert affine == Work(6 * 4 * 120 + 3 * 24, 8 * 120)
    # On 2 x 2 every patch sees three others and zeros; on 3 x 3 only the middle sees no zeros.
    assert [roofline.attended(N) for N in (1, 4, 9)] == [1, 16, 4 * 4 + 4 * 6 + 8]
    attention = roofline.neighbourhood_attention(2, 4, 8, 2)
    assert attention == Work(2 * (4 * 64 + 16), 2 * 2 * 2 * 8 * 16)
    # 2 x 1 maps of 2 x 2 patches of 3 x 3 places, 5 channels: 360 numbers become 1440, behind 576
    # of a skip. Sums of two: 2 results for each number, then 4.
    resize = roofline.upsample_concat(2, 1, 2, 5, 2, 3, 4)
    assert resize == Work(4 * (360 + 1440 + 2 * 576), 3 * (720 + 1440))
    both = roofline.upsample_concat(2, 1, 2, 5, 2, 3, 4, backward=True)
    assert both == resize + Work(4 * (1440 + 360), 5 * (720 + 360))


def test_roofline_of_the_discriminator_by_hand() -> None:
    # Of 5 x 5: 3 x 3 places of 2 channels, then 2 x 2 of 3: 25 x 2 and 25 x 2 x 3 weights.
    running = roofline.discriminator_score(7, 5, 4, norm=False, widths=(2, 3))
    numbers = 7 * 25 + (50 + 2) + (150 + 3) + (12 + 1) + 7
    assert running == Work(4 * numbers, 2 * 7 * (9 * 50 + 4 * 150 + 12))
    norm = roofline.discriminator_score(7, 5, 4, norm=True, widths=(2, 3))
    assert norm == running + Work(4 * 3, 0)


def test_roofline_of_the_windows_by_hand() -> None:
    # 2 * 3 maps of 5 * 4 * 4 = 80 numbers, in and out; 7 slots of as many in all windows.
    # Scores 6 * 80 * 7 multiplications, two slots kept 6 * 80 * 2.
    found = roofline.window_lookup(2, 3, 5, 4, 2, 7, 3, 2)
    assert found == Work(2 * 2 * 480 + 4 * 560, 2 * 480 * (7 + 2))


def test_roofline_of_split_products_by_hand() -> None:
    # 6 queries of 5 against 3 x 7 slots; 15 numbers of two of them are summed for each query.
    queue = roofline.queue_lookup(2, 3, 7, 5, 3, 4)
    assert queue == Work(4 * (30 + 105 + 315 + 90), 6 * 2 * 6 * 7 * 5 + 2 * 6 * 2 * 15)
    linear = roofline.split_linear(2, 3, 5, 7, 4)
    assert linear == Work(4 * (30 + 35 + 7 + 42), 3 * 2 * 6 * 7 * 5)
    assert [tiny(name).unit for name in ("queue_lookup", "split_linear")] == ["bfloat16"] * 2
    assert tiny("discriminator_score").unit == "float32"


def test_roofline_of_the_block_is_that_of_its_parts() -> None:
    # Width 8, 2 narrow channels on one place: C = 2. Four patches, code of 3 bits.
    weights = 8 * 2 + (2 + 3) * 8 + 4 * 4 + 0
    layers = 2 * 4 * (8 * 2 + 5 * 8 + 4 * 4 + 0)
    parts = roofline.memory_lookup(1, 4, 7, 2, 3, 4).flops
    parts += roofline.neighbourhood_attention(1, 4, 2, 4).flops
    block = roofline.inpaint_block(1, 4, 7, 2, 8, 3, 4)
    assert block == Work(4 * (2 * 4 * 8 + weights + 4 * 7 * 2), layers + parts)


def test_a_floor_is_the_larger_of_two_times() -> None:
    ceilings = Ceilings(bytes_per_s=100.0, bfloat16=1000.0, float32=10.0)
    assert ceilings.floor(Work(200, 10), "float32") == 2.0
    assert ceilings.floor(Work(200, 50), "float32") == 5.0
    assert ceilings.floor(Work(200, 50), "bfloat16") == 2.0


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the hardware does not compute in bfloat16, a product of 1024 x 1024 takes seconds.
    rate = roofline._matrix_rate
    monkeypatch.setattr(roofline, "_matrix_rate", lambda _, *what: rate(128, *what))
    ceilings = roofline.measure(CPU)
    assert 1e8 < ceilings.bytes_per_s < 1e13
    assert 1e8 < ceilings.float32 < 1e15
    assert 1e6 < ceilings.bfloat16 < 1e15


@pytest.mark.parametrize(
    ("operation", "direction"),
    sorted({(case.operation, case.direction) for case in cases(CPU, "tiny")}),
)
def test_right_contenders_pass_and_wrong_ones_are_refused(operation: str, direction: str) -> None:
    case = tiny(operation, direction)
    made = problem(case, CPU)
    for contender in ("eager", "squid_fast"):
        assert verify(case, made, call_of(case, made, function_of(made, contender))) < 1e-5
    ours = made.ours

    def wrong(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        result = ours(*inputs)
        return tuple(x * 1.001 for x in result) if isinstance(result, tuple) else result * 1.001

    made.ours = wrong
    with pytest.raises(Wrong, match="off by"):
        verify(case, made, call_of(case, made, made.ours))


def test_a_wrong_gradient_and_a_wrong_draw_are_refused() -> None:
    case = tiny("memory_lookup", "forward_backward")
    made = problem(case, CPU)
    call = call_of(case, made, made.ours)
    with pytest.raises(Wrong, match="gradient 1"):
        verify(case, made, lambda: [x * (1 + 0.01 * i) for i, x in enumerate(call())])
    case = tiny("masked_shortcut")
    made = problem(case, CPU)
    with pytest.raises(Wrong, match="positions are in-painted"):
        verify(case, made, lambda: [made.inputs[1]])


def test_times_of_what_takes_long_are_long() -> None:
    ticks = iter(range(10**6))
    timed = timing.on_cpu(lambda: [next(ticks) for _ in range(1000)], seconds=0.01)
    assert 1e-6 < timed.median < 0.1
    assert len(timed.warm) >= 5
    assert timing.Timing([1.0, 2.0, 3.0, 4.0, 5.0], []).spread == 2.0


def test_cold_times_are_what_the_call_adds_to_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """With replays that add up the seconds of a graph's calls, in place of a GPU."""
    spent = 0.0

    def spend(seconds: float) -> None:
        nonlocal spent
        spent += seconds

    def event_seconds(replay: timing.Call) -> float:
        nonlocal spent
        spent = 0.0
        replay()
        return spent

    monkeypatch.setattr(timing, "_graph", lambda call: SimpleNamespace(replay=call))
    monkeypatch.setattr(timing, "event_seconds", event_seconds)
    monkeypatch.setattr(timing, "_flush", lambda: lambda: spend(80e-6))
    for seconds in (2e-6, 30e-6, 5e-3):
        timed = timing.on_cuda(lambda seconds=seconds: spend(seconds))
        assert len(timed.warm) == len(timed.cold) == timing.REPEATS
        assert timed.median == pytest.approx(seconds)
        assert timed.cold == pytest.approx([seconds] * timing.REPEATS)


def test_rows_of_a_gpu_are_held_against_the_floor(tmp_path: Path) -> None:
    case = tiny("gumbel_shrinkage")
    results = Timings(CPU, tmp_path)
    results._ceilings = Ceilings(bytes_per_s=1e9, bfloat16=1e12, float32=1e12)
    row = results.add(case, "eager", 0.0, timing.Timing([2e-6], [4e-6]))
    moved = 2 * 4 * (2 * 4 * 7)  # bytes: 448
    assert (row["floor_us"], row["fraction_of_floor"]) == (moved / 1e3, 0.112)
    assert row["gb_per_s"] == pytest.approx(moved / 2e-6 / 1e9)
    assert row["tflops"] == pytest.approx(4 * 56 / 2e-6 / 1e12)


def test_results_keep_rows_of_the_same_commit_and_drop_others(tmp_path: Path) -> None:
    case = tiny("gumbel_shrinkage")
    results = Timings(CPU, tmp_path)
    results.add(case, "eager", 1e-7, timing.Timing([4e-6], []))
    row = Timings(CPU, tmp_path).add(case, "squid_fast", 1e-7, timing.Timing([2e-6], []))
    assert row["ratio_to_eager"] == 2.0
    written = json.loads(results.results.path.read_text())
    assert [r["contender"] for r in written["rows"]] == ["eager", "squid_fast"]
    assert written["torch"] == torch.__version__
    again = Timings(CPU, tmp_path)
    again.fail(case, "squid_fast", Wrong("off"))
    assert list(again.failures.values()) == ["WrongResultError: off"]
    assert len(json.loads(results.results.path.read_text())["rows"]) == 1
    written["commit"] = "another"
    results.results.path.write_text(json.dumps(written))
    assert Timings(CPU, tmp_path).rows == {}


def test_the_table_of_microbenchmarks(folder: Path) -> None:
    assert pages.TABLES["micro_cuda"]().startswith("Not measured yet")
    case, results = tiny("gumbel_shrinkage", "forward_backward"), Timings(CPU, folder)
    results.add(case, "eager", 1e-7, timing.Timing([4e-6], []))
    results.add(case, "squid_fast", 1e-7, timing.Timing([2e-6], []))
    line = "| gumbel shrinkage, forward + backward | B 2, N 4, M 7, k 5 | float32 | 4 |  | 2.00 × |"
    assert line in pages.TABLES["micro_cpu"]().splitlines()


def test_the_table_of_speed_says_of_every_part_how_it_was_measured(folder: Path) -> None:
    how = {"device": "That", "threads": 2, "precision": "int8", "torch": "3", "rounds": 4}
    part = how | {"rows": {"ours": {"images_per_second": 8.0, "ratio": 2.0}}}
    path = folder / "speed_cpu.json"
    path.write_text(json.dumps({"evaluation": part, "training": part}))
    alike = pages.TABLES["speed"]().splitlines()
    assert "| training: ours | 8.0 | 2.0 × |" in alike
    said = "2 cores (That), int8, torch 3, medians of 4 interleaved rounds."
    assert alike[-2:] == ["", said]
    path.write_text(json.dumps({"evaluation": part, "training": part | {"rounds": 9}}))
    apart = pages.TABLES["speed"]().splitlines()
    assert apart[-3:] == [f"Evaluation: {said}", "", f"Training: {said.replace('4', '9')}"]


def test_a_part_measured_anew_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "speed_cpu.json"
    kept = {"commit": "x", "rows": {"a": 1}}
    path.write_text(json.dumps({"training": {"rows": {"old": 1}}, "screening": kept}))
    options = ["--rounds=1", "--batch=2", "--threads=1", "--device=cpu", "--part=training"]
    main(["speed", "--preset=small", *options, f"--output={tmp_path}"])
    written = json.loads(path.read_text())
    assert written == {"screening": kept, "training": written["training"]}
    training = written["training"]
    assert (training["commit"], training["rounds"], training["preset"]) == (commit(), 1, "small")
    assert (training["batch"], training["threads"], training["torch"]) == (2, 1, torch.__version__)
    assert list(training["rows"]) == ["published loop", "squid_fast.Trainer"]
    first, second = training["rows"].values()
    assert first["images"] == second["images"] == 4
    ratio = first["milliseconds"] / second["milliseconds"]
    assert second["ratio"] == pytest.approx(ratio, rel=0.01)


def test_every_command_describes_itself_and_each_of_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = [[name] for name in COMMANDS]
    for command in [*commands, *(["accuracy", name] for name in COMMANDS["accuracy"][0])]:
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        usage, about, *rest = capsys.readouterr().out.split("\n\n")
        assert usage.startswith(f"usage: python -m bench {' '.join(command)} ")
        assert re.match(r"[A-Z].*[.:]$", about.splitlines()[0]), about
        options = "\n\n".join(rest).partition("options:\n")[2]
        for option in re.findall(r"^  (--.*(?:\n {4,}.*)*)", options, re.MULTILINE):
            assert re.search(r"\s{2,}[A-Z][^ ]*( .*)?", option), f"{command}: {option}"
            assert option.rstrip().endswith("."), f"{command}: {option}"


def test_an_unknown_command_names_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sped"])
    assert ended.value.code == 2
    assert "'operations', 'machine-code', 'speed'" in capsys.readouterr().err


def test_results_say_where_they_come_from_and_resume_with_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "figures.json"
    results = Results(path, CPU, {"settings": {"epochs": 2}})
    results.figures["runs"] = {"0.1": [1, 2]}
    results.write()
    written = json.loads(path.read_text())
    about = machine.describe(CPU) | {"commit": commit(), "settings": {"epochs": 2}}
    assert written == about | results.figures

    path.write_text(json.dumps(written | {"torch": "1.0"}))
    for epochs, same, known in (
        (2, ["settings"], results.figures),
        (2, [], {}),
        (3, ["settings"], {}),
    ):
        again = Results(path, CPU, {"settings": {"epochs": epochs}})
        again.resume(*same)
        assert again.figures == known


def test_a_file_of_figures_has_a_line_for_each_row_and_never_nan(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    content = {"µ": "×", "rows": [{"a": 1}, {"a": [2, {"b": 3}]}], "none": [], "x": {"y": [1]}}
    measurements.write(content, path)
    assert measurements.read(path) == content
    lines = path.read_text(encoding="utf-8").splitlines()
    assert {'{"a": 1},', '{"a": [2, {"b": 3}]}', '"µ": "×",'} <= set(lines)
    with pytest.raises(ValueError, match="JSON"):
        measurements.write({"rows": [float("nan")]}, path)
    assert measurements.read(path) == content
    assert measurements.read(tmp_path / "absent.json") == {}


def test_pages_give_the_citation_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "CITATION.cff"
    page.write_text("cff-version: 1.2.0\nversion: 0.0.1\n")
    monkeypatch.setattr(pages, "PAGES", (page,))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"CITATION.cff: figures are out of date"):
        main(["pages", "--check"])
    main(["pages"])
    assert page.read_text() == f"cff-version: 1.2.0\nversion: {squid_fast.__version__}\n"
    main(["pages", "--check"])


def test_plain_pytest_collects_no_benchmarks() -> None:
    plain = pytest_in_a_process("--collect-only", "tests/bench/test_bench.py", "bench")
    assert "tests/bench/test_bench.py::test_plain_pytest" in plain.stdout, plain.stdout
    assert "bench/operations/test_operations.py" not in plain.stdout


def test_the_flag_runs_benchmarks_alone(tmp_path: Path) -> None:
    options = ["--bench-device=cpu", "--bench-sizes=tiny", f"--bench-results={tmp_path}"]
    done = pytest_in_a_process("--benchmark", *options, "-k", "gumbel_shrinkage-forward-")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    written = json.loads((tmp_path / "micro_cpu.json").read_text())
    assert {"device", "torch", "triton", "python", "commit", "date", "threads"} <= written.keys()
    assert [row["contender"] for row in written["rows"]] == ["eager", "squid_fast"]
    assert all(row["median_us"] > 0 for row in written["rows"])


def test_the_runner_without_pytest_does_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, plan = Timings(CPU, tmp_path), schedule(CPU, "tiny", ["gumbel_shrinkage"])
    monkeypatch.setattr(timing, "on_cpu", lambda call: timing.Timing([1e-6], []))
    assert micro.run(results, plan) == 0
    assert len(results.rows) == 4
    assert micro.run(results, plan, check=True) == 0
    assert "squid_fast: correct to " in capsys.readouterr().out
    late = Timings(CPU, tmp_path, seconds=-1)
    assert micro.run(late, plan[:1]) == 0
    assert (len(late.rows), [*late.failures.values()]) == (3, ["skipped: the time was up"])
    monkeypatch.setattr(micro, "verify", lambda *_: (_ for _ in ()).throw(Wrong("no")))
    assert micro.run(results, plan) == 4
    assert results.rows == {}
    assert "FAILED, WrongResultError: no" in capsys.readouterr().out


def test_runs_together_are_ranked_by_the_mean_of_their_z_scores() -> None:
    images = image_set(4, anomalous=2)
    one, other = np.float32([2, 4, 0, 3]), np.float32([3, 1, 2, 0])
    areas = [together(images, [{"z": z}])["z"]["auroc"] for z in (one, other)]
    assert areas == [0.75, 0.75]
    assert together(images, [{"z": one}, {"z": other}])["z"]["auroc"] == 1.0


def test_the_table_of_accuracy_is_of_the_runs_that_it_shows(folder: Path) -> None:
    folder = folder / "accuracy"
    folder.mkdir()
    labels, z = np.repeat([0, 1], 20), np.arange(40.0)
    split = {PAPER_SCORE: evaluate(labels, z, score_name=PAPER_SCORE).to_json()}
    about = {"seed": 0, "training_images": 9, "recipe": {"epochs": 2}, "training_minutes": 3.0}
    run = {"evaluation": {"val": split, "test": split}, "about": about, "threads": 7}
    (folder / "zhanglab_cpu-seed0.json").write_text(json.dumps(run))
    assert "2 epochs, 3 minutes. Accuracy" in pages.TABLES["accuracy"]()
    about["machine"] = {"device": "That", "threads": 2}
    (folder / "zhanglab_cpu-seed1.json").write_text(json.dumps(run))
    said = pages.TABLES["accuracy"]()
    assert "2 epochs, 3 minutes, 3 minutes on 2 cores (That). Accuracy" in said
    both = {"runs": ["zhanglab_cpu-seed0", "zhanglab_cpu-seed1"], **run}
    (folder / "together.json").write_text(json.dumps(both))
    assert "| together |" in pages.TABLES["accuracy"]()
    both["runs"].append("zhanglab_cpu-seed2")
    (folder / "together.json").write_text(json.dumps(both))
    with pytest.raises(ValueError, match=r"seed2, but there are .*seed1: give all"):
        pages.TABLES["accuracy"]()


def test_a_step_is_timed_with_the_threads_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_SECONDS", 0.0)
    monkeypatch.setattr(threads, "fastest_threads", lambda turn, most: turn() or most + 1)
    for way, number in {"one": 1, "limited": torch.get_num_threads(), "chosen": 2}.items():
        row = threads.steps("small", way, "float32")
        assert (row["threads"], row["steps"]) == (number, 1)
        assert row["mean"] == row["median"] == row["longest"] > 0


def test_busy_processes_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a: started.append(popen(*a)) or started[-1])
    with threads.busy(2):
        assert [other.poll() for other in started] == [None, None]
    assert all(other.poll() is not None for other in started)


def test_every_stage_of_scoring_is_timed() -> None:
    found = stages.times(random_bundle(PRESETS["small"]), batch=1, rounds=1)
    names = {"first stage", "in-painting", "head", "everything else", "total"}
    names |= {f"{part} {i}" for part in ("encoder", "decoder") for i in (1, 2, 3)}
    assert {"published", "float32"} <= set(found)
    assert all(names <= set(times) for times in found.values())
