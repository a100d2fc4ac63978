"""``torch.compile`` as the backend of a scorer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import compile_fx

from squid_fast import Scorer, save_bundle
from squid_fast.experiments.baselines import BaselineScorer, load_scorer
from squid_fast.experiments.baselines.scorer import save_baseline
from squid_fast.experiments.baselines.shallow import PcaResidual
from squid_fast.experiments.benchmark import Benchmark
from squid_fast.inference import compiler, graphs
from squid_fast.inference.compiler import compiled, lacking
from squid_fast.inference.convolution import use_cudnn
from squid_fast.inference.graphs import Graphs
from squid_fast.inference.precision import check_hardware
from squid_fast.inference.scores import Calibration, ScoreCalibration
from tests.command_line import squid
from tests.cuda_stand_ins import Cuda, cuda
from tests.factories import (
    decoder_memory,
    image_batch,
    image_set,
    tiny_bundle,
    trained_discriminator,
    trained_squid,
)
from tests.processor import needs_bf16

__all__ = ["cuda"]  # a fixture

CPU = torch.device("cpu")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The programs that a compiler was given, which runs them as they are."""
    found: list[fx.GraphModule] = []

    def backend(program: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(program)
        return program.forward

    monkeypatch.setattr(compiler, "_COMPILER", backend)
    torch.compiler.reset()
    return found


def operations(program: fx.GraphModule) -> list[str]:
    """Those of squid_fast that a program calls."""
    names = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return [name.split(".")[1] for name in names if name.startswith("squid_fast")]


def scorers(precision: str = "float32") -> tuple[Scorer, Scorer]:
    bundle = tiny_bundle()
    parts = bundle.model, bundle.discriminator, bundle.calibration
    how = {"precision": precision, "device": "cpu"}
    return Scorer(*parts, **how), Scorer(*parts, backend="compile", **how)


def test_it_is_one_program_with_our_operations_in_it(programs: list[fx.GraphModule]) -> None:
    plain, ours = scorers()
    images = image_batch(21, seed=1)
    expected, found = (s.score(images, reconstruction=True) for s in (plain, ours))
    torch.testing.assert_close(found.raw, expected.raw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction, rtol=1e-4, atol=1e-5)
    (program,) = programs
    found_in = operations(program)
    assert found_in[:2] == ["memory_lookup", "neighbourhood_attention"]
    assert found_in[2:] == ["upsample_concat", "upsample_concat", "reconstruct"]
    # Bytes, other sizes and other scores have programs of their own; what is known is used again.
    for given, count in ((images, 1), (image_set(3).images, 2), (images[:1], 3), (images[:7], 3)):
        ours.score(given)
        assert len(programs) == count
    ours.raw_scores(image_set(3))
    assert len(programs) == 4
    torch.testing.assert_close(ours.score(images[:3]).raw, plain.score(images[:3]).raw)


@needs_bf16
def test_it_computes_in_bf16_too(programs: list[fx.GraphModule]) -> None:
    plain, ours = scorers("bf16")
    images = image_batch(4, seed=1)
    exact = scorers()[0].score(images, reconstruction=True).reconstruction
    error = (ours.score(images, reconstruction=True).reconstruction - exact).abs().max()
    assert 0 < error < 0.02
    assert plain.precision == ours.precision == "bf16"
    assert not any("mkldnn" in str(node.target) for node in programs[0].graph.nodes)


def test_many_sizes_and_scores_are_no_reason_to_give_up(programs: list[fx.GraphModule]) -> None:
    function = compiled(lambda x, name: (x + len(name),))
    for size in range(1, 12):  # PyTorch would stop at the eighth
        for name in ("a", "bb"):
            assert function(torch.zeros(size), name)[0].tolist() == [float(len(name))] * size
    assert len(programs) == 22


def test_what_would_be_several_programs_raises(programs: list[fx.GraphModule]) -> None:
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(broken)(torch.ones(2))


def test_a_gpus_graphs_capture_the_program(
    cuda: Cuda, programs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = []

    def capture(call: Callable[[], Any], *_: Any) -> tuple[Any, Any]:
        results = call()  # the other stand-in cannot look into a program

        def replay() -> None:
            replays.append(len(results[0]))
            for old, new in zip(results, call(), strict=True):
                old.copy_(new)

        return replay, results

    monkeypatch.setattr(graphs, "capture", capture)
    plain, ours = scorers()
    ours.model._graphs = Graphs(CPU, 8)
    images = image_batch(11, seed=1)
    expected = plain.score(images).raw
    for given in (images, 1 - images, images):
        found = ours.score(given).raw
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(programs) == 2  # of 8 images, and of 4
    assert replays == [8, 4] * 3


def test_the_whole_network_of_a_gpu_is_one_program(
    programs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"decoder_memory": decoder_memory("MemoryMatrixBlock", 64, 4)}
    pair = trained_squid(**memory), trained_discriminator(torch.rand(4, 1, 64, 64))
    scorer = Scorer(*pair, precision="float32", device="cpu", backend="compile")
    generator = scorer.model.generator
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *how: F.conv2d(*how))
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", lambda x, w, z, *how: z.clone())
    for stage in (*generator.downs, *generator.ups):
        stage.bfloat16().to(memory_format=torch.channels_last)
        stage.dtype = stage.source = torch.bfloat16
    use_cudnn(generator)
    scorer.model.measure(image_set(2, 64).images, ("discriminator_instance",))
    (program,) = programs
    found = operations(program)
    assert found.count("convolution") == 12  # three of every stage but the first
    others = ["memory_lookup", "neighbourhood_attention", "reconstruct", "upsample_concat"]
    assert sorted(set(found) - {"convolution"}) == others


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_compiled_is_refused_at_the_door(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="backend is 'fast'; it must be 'eager' or 'compile'"):
        check_hardware("float32", CPU, "fast")
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert "no-compiler" in lacking(CPU)
    bundle = tiny_bundle()
    for build in (
        lambda: Scorer(bundle.model, bundle.discriminator, device="cpu", backend="compile"),
        lambda: Scorer.load(tmp_path / "none", device="cpu", backend="compile"),
    ):
        with pytest.raises(ValueError, match=r"needs the C\+\+ compiler .*; 'eager' would fit"):
            build()
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    assert lacking(torch.device("cuda")) == "Triton"


def test_it_knows_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squid_fast.inference.precision.has_int8", lambda: True)
    with pytest.raises(ValueError, match="backend is 'compile', which knows no int8"):
        check_hardware("int8", CPU, "compile")


def test_a_baseline_has_no_backend(tmp_path: Path) -> None:
    method = PcaResidual(mean=torch.zeros(1024), components=torch.eye(2, 1024))
    known = Calibration({"distance": ScoreCalibration(1.0, 0.5, 2.0, 0.05, [])}, [], [], "")
    save_baseline(BaselineScorer("pca", method, 32, known, "cpu"), tmp_path, {})
    with pytest.raises(ValueError, match="backend is 'compile'; a pca is scored by 'eager' alone"):
        load_scorer(tmp_path, device="cpu", backend="compile")


# --- where it is chosen ---------------------------------------------------------------------------


def test_rows_of_two_backends_are_not_mixed() -> None:
    plain, ours = scorers()
    assert plain.fingerprint != ours.fingerprint


def test_a_benchmark_times_both(programs: list[fx.GraphModule]) -> None:
    found = Benchmark(
        tiny_bundle(), CPU, "float32", batch=2, rounds=1, seconds=0, backend="compile"
    ).run(["evaluation"])
    *_, plain, small, large = (name for name in found["evaluation"])
    assert plain == "squid_fast.Scorer, float32, batch of 8"
    assert small == "squid_fast.Scorer, float32, compiled, batch of 2"
    assert large == "squid_fast.Scorer, float32, compiled, batch of 8"
    assert found["backend"] == "compile"


@pytest.mark.parametrize("verb", ["screen", "evaluate", "bench"])
def test_every_verb_refuses_what_it_cannot_compile(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_bundle(tiny_bundle(), tmp_path / "run")
    monkeypatch.setenv("CXX", "no-compiler")
    rest = {
        "screen": (tmp_path / "run", tmp_path, "--out", tmp_path / "t.csv"),
        "evaluate": (tmp_path / "run", "--data", tmp_path),
        "bench": ("--bundle", tmp_path / "run"),
    }[verb]
    done = squid(verb, *rest, "--device", "cpu", "--backend", "compile", check=False)
    assert done.returncode == 1
    assert "backend is 'compile', which needs the C++ compiler 'no-compiler'" in done.stderr


# --- TF32 -----------------------------------------------------------------------------------------


def test_that_tf32_is_off_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> None:
        """What Inductor says on a card with TF32."""
        with monkeypatch.context() as card:
            card.setattr(torch.cuda, "is_available", lambda: True)
            card.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
            compile_fx._warn_tf32_disabled.__wrapped__()  # which says it once

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="TensorFloat32 tensor cores"):
            warn()
    warn()  # under the filters of the project

    def backend(program: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        warn()
        return program.forward

    monkeypatch.setattr(compiler, "_COMPILER", backend)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a program that uses squid_fast
        assert compiled(lambda x: x + 1)(torch.ones(2)).tolist() == [2.0, 2.0]
