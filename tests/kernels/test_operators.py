"""The operators as users meet them, with kernels behind them."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec
from types import ModuleType

import pytest
import torch

from squid_fast import PRESETS, SQUID, kernels, ops
from squid_fast.kernels import dispatch
from tests.kernels.devices import DEVICE, ON_GPU
from tests.ops.samples import assert_compiled_equals_eager, compile_cases, operator_samples

cuda = pytest.mark.skipif(not ON_GPU, reason="there is no GPU")


def on_device(x: object) -> object:
    if isinstance(x, list):
        return list(map(on_device, x))
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().to(DEVICE).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("name", operator_samples())
def test_opcheck(name: str) -> None:
    for sample in operator_samples()[name]:
        if all(x.numel() for x in sample if isinstance(x, torch.Tensor)) or "lookup" in name:
            arguments = tuple(map(on_device, sample))
            torch.library.opcheck(getattr(torch.ops.squid_fast, name), arguments)


@pytest.mark.parametrize("name", compile_cases())
def test_compiled_equals_eager(name: str) -> None:
    assert_compiled_equals_eager(name, "aot_eager", DEVICE)


# --- where kernels serve --------------------------------------------------------------------------


def test_the_cpu_is_served_by_pytorch_unless_told_otherwise(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the tests of a GPU do without
    x = torch.zeros(2, 3)
    with kernels.use("on"):
        assert not dispatch.serves_gumbel_shrinkage(x, 2)
    with kernels.use("interpret"):
        assert dispatch.serves_gumbel_shrinkage(x, 2)
        with kernels.use("off"):
            assert not dispatch.serves_gumbel_shrinkage(x, 2)
        assert dispatch.serves_gumbel_shrinkage(x, 2)


def many_positions(count: int) -> torch.Tensor:
    return torch.zeros(1, 1, 1, 1).expand(1, 2, 1, count)


def weights(channels: int) -> list[torch.Tensor]:
    return [torch.zeros(channels, 1, 5, 5)]


@pytest.mark.parametrize(
    ("served", "serves"),
    [
        (True, lambda: dispatch.serves_gumbel_shrinkage(torch.zeros(2, 99), 64)),
        (False, lambda: dispatch.serves_gumbel_shrinkage(torch.zeros(2, 99), 65)),
        (False, lambda: dispatch.serves_gumbel_shrinkage(torch.zeros(0, 99), 5)),
        (False, lambda: dispatch.serves_gumbel_shrinkage(torch.zeros(2, 99).double(), 5)),
        (True, lambda: dispatch.serves_memory_lookup(torch.zeros(2, 1, 3), 100_000, "gumbel", 64)),
        (False, lambda: dispatch.serves_memory_lookup(torch.zeros(2, 1, 3), 100_000, "gumbel", 65)),
        (True, lambda: dispatch.serves_memory_lookup(torch.zeros(2, 1, 3), 512, "hard", 0)),
        (False, lambda: dispatch.serves_memory_lookup(torch.zeros(2, 1, 3), 513, "raw", 0)),
        (
            True,
            lambda: dispatch.serves_discriminator_score(torch.zeros(1, 1, 256, 9), weights(128)),
        ),
        (False, lambda: dispatch.serves_discriminator_score(torch.zeros(1, 1, 257, 9), weights(1))),
        (False, lambda: dispatch.serves_discriminator_score(torch.zeros(1, 1, 9, 9), weights(129))),
        (True, lambda: dispatch.serves_masked_shortcut(many_positions(2**30 - 1))),
        (False, lambda: dispatch.serves_masked_shortcut(many_positions(2**31 - 1))),
    ],
)
def test_the_rules(served: bool, serves, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert serves() == served


def test_another_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="setting is 'fast'; it must be one of on, off, interpret"):
        kernels.use("fast").__enter__()


def dispatch_anew() -> ModuleType:
    """What a new process would import."""
    spec = find_spec("squid_fast.kernels.dispatch")
    anew = module_from_spec(spec)
    spec.loader.exec_module(anew)
    return anew


@pytest.mark.parametrize("value", ["on", "off"])
def test_the_environment_chooses(value: str, monkeypatch) -> None:
    monkeypatch.setenv("SQUID_FAST_KERNELS", value)
    assert dispatch_anew()._setting == value


def test_the_environment_is_checked(monkeypatch) -> None:
    monkeypatch.setenv("SQUID_FAST_KERNELS", "no")
    sentence = r"SQUID_FAST_KERNELS is 'no'; it must be one of on, off, interpret\."
    with pytest.raises(ValueError, match=sentence):
        dispatch_anew()


def test_without_an_interpreter_the_cpu_cannot_be_interpreted(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is None; it must be '1'"):
        ops.gumbel_shrinkage(torch.zeros(2, 3), 2)


# --- on a GPU -------------------------------------------------------------------------------------


def small() -> tuple[SQUID, torch.Tensor]:
    torch.manual_seed(0)
    size = PRESETS["small"].image_size
    return SQUID.from_preset("small").to(DEVICE), torch.rand(4, 1, size, size, device=DEVICE)


@cuda
def test_kernels_equal_pytorch_on_the_gpu(monkeypatch) -> None:
    model, images = small()
    model.eval()
    with torch.no_grad(), kernels.use("on"):
        fast = model(images)["recon"]
    monkeypatch.undo()
    with torch.no_grad(), kernels.use("off"):
        plain = model(images)["recon"]
    assert (fast - plain).abs().max() < 1e-4


@cuda
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_compiles_as_one_graph(train: bool, autocast: bool) -> None:
    torch.compiler.reset()
    model, images = small()
    model.train(train)
    compiled = torch.compile(model, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        outputs = compiled(images)
    if train:
        outputs["recon"].float().square().mean().backward()
    assert outputs["recon"].isfinite().all()


@cuda
def test_a_cuda_graph_captures_a_training_step() -> None:
    model, images = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, capturable=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        outputs = model(images)
        loss = (outputs["recon"] - images).square().mean()
        loss.backward()
        optimizer.step()
        for module in model.modules():
            if hasattr(module, "update"):
                module.update()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@cuda
def test_every_replay_draws_a_new_mask() -> None:
    a, b = torch.ones(2, 1, 32, 32, device=DEVICE), torch.zeros(2, 1, 32, 32, device=DEVICE)
    ops.masked_shortcut(a, b, 0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.masked_shortcut(a, b, 0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)
