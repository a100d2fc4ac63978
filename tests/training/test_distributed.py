"""Training on several processes equals training on one: two CPU processes under torchrun."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from squid_fast import SQUID, MemoryQueue
from squid_fast.modules import Discriminator, freeze_cancelled_biases
from squid_fast.presets import Recipe
from squid_fast.training import Trainer, squid, train
from squid_fast.training.distributed import Processes, SyncBatchNorm2d
from squid_fast.training.learner import step_seed
from tests.factories import image_set, open_masks, tiny_squid
from tests.modules.published import cancelled_biases
from tests.training.test_training import assert_same_state

pytest.importorskip("lightning_fabric")

STEPS, STOP = 10, 5

# What both processes of the one launch for the runs do.
WORKER = """
from tests.training.test_distributed import work
work()
"""


def tiny() -> SQUID:
    """A model without masks, which ranks draw for themselves."""
    model = tiny_squid()
    open_masks(model)
    return model


@contextmanager
def in_float64() -> Iterator[None]:
    """Train in float64, and pretend to validate, for which oneDNN has no float64.

    In float32 some activation soon comes so near to zero (7e-8, after three steps with AVX2) that
    the order of a sum decides its sign, and so whether its ReLU passes a gradient: from there on
    correct runs go apart a thousandfold. In float64 none does, and runs differ by 2e-12.
    """
    step, make_optimizers = Trainer.step, squid.make_optimizers

    def wide_step(trainer: Trainer, pixels: Tensor, index: int) -> dict[str, Tensor]:
        with patch.object(Tensor, "float", Tensor.double):  # with which losses are widened
            return step(trainer, pixels.double(), index)

    def wide_optimizers(generator: SQUID, discriminator: Discriminator, *rest: Any) -> Any:
        return make_optimizers(generator.double(), discriminator.double(), *rest)

    with (
        patch.object(Trainer, "step", wide_step),
        patch.object(squid, "make_optimizers", wide_optimizers),
        patch.object(squid, "validate", lambda *_: {"auroc": 0.5}),
    ):
        yield


def train_in(folder: Path, stop: int = 99, resume: bool = False) -> str:
    """Train until the last rank asks to stop, after so many steps in here; how it ended."""
    processes, asked = Processes.from_environment(), iter(range(1, 100))
    recipe = Recipe(
        batch_size=8, epochs=5, t_max=5, lr=1e-3, n_critic=1, ema_decay=0.9, validate_every=5
    )
    with in_float64():
        result = train(
            tiny(), image_set(20), folder, recipe, validation_set=image_set(8, anomalous=4),
            device="cpu", precision="float32", resume=resume,
            should_stop=lambda: next(asked) >= stop and processes.rank == processes.count - 1,
        )  # fmt: skip
    if not processes.is_main:
        torch.save(result.model.state_dict(), folder / f"rank{processes.rank}.pt")
    return f"{folder.name}: rank {processes.rank} step {result.step} finished {result.finished}"


def work() -> None:
    """All parts of the runs that are for two processes, and the sums."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    # One group for all, since a second would find the addresses of the first in torchrun's store.
    with patch.object(dist, "destroy_process_group"):
        print(train_in(folder / "two"))
        print(train_in(folder / "two then one", STOP))
        do_sums()
    print(train_in(folder / "one then two", resume=True))


def launch(*command: object) -> str:
    """Run a script, or a module behind "-m", on two processes; its output."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*torchrun, *map(str, command)], env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 130), done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one process, on two, and with a stop and another number behind it.

    A folder with a folder for each, and what the two processes printed.
    """
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "worker.py"
    script.write_text(WORKER)
    done, stopped = f"step {STEPS} finished True", f"step {STOP} finished False"
    assert train_in(folder / "one") == f"one: rank 0 {done}"
    assert train_in(folder / "one then two", STOP) == f"one then two: rank 0 {stopped}"
    out = launch(script, folder)
    for rank in range(2):
        for name, end in {"two": done, "two then one": stopped, "one then two": done}.items():
            assert f"{name}: rank {rank} {end}" in out.splitlines(), out
    assert train_in(folder / "two then one", resume=True) == f"two then one: rank 0 {done}"
    (folder / "output.txt").write_text(out)
    return folder


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("run", ["two", "two then one", "one then two"])
def test_two_processes_train_as_one_does(runs: Path, run: str) -> None:
    one, other = checkpoint(runs / "one"), checkpoint(runs / run)
    for part in ("generator", "discriminator", "average", "optimizers"):
        torch.testing.assert_close(other[part], one[part], rtol=0, atol=1e-9)
    name = "up_blocks.0.conv.conv1.0.weight"
    moved = one["generator"][name] - tiny().state_dict()[name]
    assert float(moved.abs().max()) > 1e-3  # a million times the tolerance
    pointers = [c["generator"]._metadata["inpaint_block.memory"]["ptr"] for c in (one, other)]
    assert pointers == [STEPS * 8 % 12] * 2


@pytest.mark.parametrize("name", ["two", "one then two"])
def test_all_ranks_hold_the_same_model(runs: Path, name: str) -> None:
    theirs = torch.load(runs / name / "rank1.pt", weights_only=True)
    assert_same_state(checkpoint(runs / name)["generator"], theirs)


def test_one_log_with_the_losses_of_all(runs: Path) -> None:
    found = []
    for name in ("one", "two"):
        rows = list(csv.DictReader((runs / name / "metrics.csv").read_text().splitlines()))
        found.append({(r["step"], r["name"]): float(r["value"]) for r in rows})
        assert len(found[-1]) == len(rows)
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        if key[1].startswith("loss/"):
            assert found[1][key] == pytest.approx(value, rel=1e-6), key  # added up in float32


def test_the_processes_do_the_same_sums(runs: Path) -> None:
    assert (runs / "output.txt").read_text().count("all the same") == 2


def test_no_process_waits_for_the_gradient_of_a_cancelled_bias(tmp_path: Path) -> None:
    """Without synchronised batch norm DistributedDataParallel would, and refuse the second step."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = tiny_squid()
        freeze_cancelled_biases(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            outputs = wrapped(image_set(4).batch(slice(None)))
            loss = outputs["recon"] + outputs["teacher_recon"] + outputs["dist_loss"]
            loss.square().mean().backward()
        missing = {name for name, p in model.named_parameters() if p.grad is None}
        assert missing == cancelled_biases(dict(model.named_parameters()))
    finally:
        dist.destroy_process_group()


def do_sums() -> None:
    """Batch norm and queue on two processes against one with the whole batch."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    whole = torch.randn(6, 3, 4, 5)
    target = torch.randn_like(whole)
    plain, ours = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    nn.init.uniform_(plain.weight), nn.init.uniform_(plain.bias)
    ours.load_state_dict(plain.state_dict())
    ours.__class__ = SyncBatchNorm2d
    mine = slice(3 * rank, 3 * rank + 3)
    x, y = whole.clone().requires_grad_(), whole[mine].clone().requires_grad_()
    expected, found = plain(x), ours(y)
    (expected * target).sum().backward()
    (found * target[mine]).sum().backward()
    torch.testing.assert_close(found, expected[mine])
    torch.testing.assert_close(y.grad, x.grad[mine])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    grad = ours.weight.grad.clone()
    dist.all_reduce(grad)
    torch.testing.assert_close(grad, plain.weight.grad)
    torch.testing.assert_close(ours.eval()(whole), plain.eval()(whole))

    features = torch.arange(2 * 5 * 2 * 4, dtype=torch.float32).view(10, 2, 4)
    queue = MemoryQueue(7, 4, 3, 2).train()
    queue(features[5 * rank : 5 * rank + 5])
    queue.update()
    newest = torch.cat([features[7:], features[3:7]])  # ten pass through a ring of seven
    assert torch.equal(queue.slots, newest.transpose(0, 1)), queue.slots
    assert int(queue.ptr) == 3
    queue.update()
    assert int(queue.ptr) == 3
    print("all the same")


def test_masks_differ_between_ranks_and_augmentation_does_not() -> None:
    seeds = {step_seed(3 - rank - 1, 17) for rank in range(8)} | {step_seed(3, 17)}
    assert len(seeds) == 9
    batch = torch.arange(12)
    shares = [Processes(rank, 3, 3).share(batch) for rank in range(3)]
    assert torch.equal(torch.cat(shares), batch)


def test_one_process_trains_on_the_device_that_its_tensors_go_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name, devices in (("cpu", 1), ("cuda", [1]), ("cuda:0", [0]), ("cuda:2", [2])):
        assert Processes().fabric_arguments(torch.device(name)) == {"devices": devices}


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match="shared out over 3 processes; a batch of 15 or 18"):
        Processes(0, 3, 3).check_batch(16)
    Processes(0, 4, 4).check_batch(16)


def test_the_verb_leaves_one_bundle(tmp_path: Path) -> None:
    for split, kinds in {"train": ("NORMAL",), "val": ("NORMAL", "PNEUMONIA")}.items():
        for kind in kinds:
            folder = tmp_path / "data" / split / kind
            folder.mkdir(parents=True)
            for index, image in enumerate(image_set(24).images):
                Image.fromarray(image[0].numpy()).save(folder / f"{index}.png")
    out = launch(
        "-m", "squid_fast", "train", "--preset", "small", "--data", tmp_path / "data",
        "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 8, "--device", "cpu",
        "--precision", "float32", "--json",
    )  # fmt: skip
    assert json.loads(out)["finished"]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "calibration.json", "checkpoint.pt", "config.json", "metrics.csv", "model.safetensors"
    }  # fmt: skip
    about = json.loads((tmp_path / "run/config.json").read_text())["about"]
    assert (about["training_images"], about["machine"]["processes"]) == (24, 2)
