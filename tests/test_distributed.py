"""Training on several processes equals training on one: two CPU processes under torchrun."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from squid_fast.training.distributed import Processes

pytest.importorskip("lightning_fabric")

STEPS, SIDE = 10, 48

# What every process runs: the training of a tiny model without masks, which ranks draw for
# themselves. By SGD: Adam moves a weight by its rate even where the gradient is but rounding
# error, so that no two orders of summation would end alike.
WORKER = """
import os, sys
from pathlib import Path
import torch
from tests.test_distributed import images, tiny
from squid_fast import MemoryQueue
from squid_fast.presets import Recipe
from squid_fast.training import train
import squid_fast.training.state as state

out, stop, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume"
torch.set_num_threads(1)
state.make_optimizers = lambda generator, discriminator, recipe, capturable: (
    torch.optim.SGD(generator.parameters(), 0.01), torch.optim.SGD(discriminator.parameters(), 0.5)
)
recipe = Recipe(batch_size=8, epochs=5, t_max=5, lr=0.01, n_critic=1, averaging=0.9,
                validate_every=5)
asked = iter(range(1, 100))
rank = os.environ.get("RANK", "0")
ask = lambda: next(asked) >= stop and rank == os.environ["LAST"]  # the other ranks follow
result = train(tiny(), images(20), out, recipe, validation_set=images(8, 4), device="cpu",
               precision="float32", resume=resume, should_stop=ask)
print(f"rank {rank} step {result.step} finished {result.finished}")
if rank != "0":
    torch.save(result.model.state_dict(), out / f"rank{rank}.pt")
"""


def tiny() -> Any:
    import squid_fast

    torch.manual_seed(0)
    model = squid_fast.SQUID(
        1, 4, 3, num_slots=12, level=2, memory_channel=144, dist=True, initial_combine=1,
        mem_num_slots=6, ops=["concat", "none"],
    )  # fmt: skip
    for module in model.modules():
        if hasattr(module, "mask_ratio"):
            module.mask_ratio = 1.0
    return model


def images(n: int, anomalous: int = 0) -> Any:
    from squid_fast.data import ImageSet

    pixels = torch.randint(0, 256, (n, 1, SIDE, SIDE), generator=torch.manual_seed(1))
    labels = (torch.arange(n) < anomalous).long()
    return ImageSet(pixels.to(torch.uint8), labels, [str(i) for i in range(n)])


def launch(processes: int, *arguments: object, script: str | None = None) -> str:
    """Run a script, or squid_fast's verbs, on so many processes; its output."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [script] if script else ["-m", "squid_fast"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"OMP_NUM_THREADS": "1", "LAST": str(processes - 1)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 130), done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run on one process, on two, and with a stop and another number behind it."""
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "worker.py"
    script.write_text(WORKER)
    for name, parts in {
        "one": [(1, 99)],
        "two": [(2, 99)],
        "two then one": [(2, 5), (1, 99)],
        "one then two": [(1, 5), (2, 99)],
    }.items():
        for index, (processes, stop) in enumerate(parts):
            resume = "resume" if index else "start"
            out = launch(processes, folder / name, stop, resume, script=str(script))
            last = index == len(parts) - 1
            expected = f"step {STEPS} finished True" if last else "step 5 finished False"
            assert out.count(expected) == processes, out
    return {name: folder / name for name in ("one", "two", "two then one", "one then two")}


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("name", ["two", "two then one", "one then two"])
def test_two_processes_train_as_one_does(runs: dict[str, Path], name: str) -> None:
    one, other = checkpoint(runs["one"]), checkpoint(runs[name])
    start = tiny().state_dict()
    for network in ("generator", "discriminator", "average"):
        assert one[network].keys() == other[network].keys()
        for key, value in one[network].items():
            # Slots are features as they came out of batch norms, and follow rounding further.
            buffer = "memMatrix" in key or "running" in key
            atol = 1e-3 if buffer else 3e-5
            torch.testing.assert_close(other[network][key], value, rtol=1e-5, atol=atol, msg=key)
    moved = (
        one["generator"]["up_blocks.0.conv.conv1.0.weight"]
        - start["up_blocks.0.conv.conv1.0.weight"]
    )
    assert float(moved.abs().max()) > 3e-4  # ten times the tolerance
    pointers = [c["generator"]._metadata["inpaint_block.memory"]["ptr"] for c in (one, other)]
    assert pointers == [STEPS * 8 % 12] * 2


def test_all_ranks_hold_the_same_model(runs: dict[str, Path]) -> None:
    theirs = torch.load(runs["two"] / "rank1.pt", weights_only=True)
    ours = checkpoint(runs["two"])["generator"]
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_one_log_with_the_losses_of_all(runs: dict[str, Path]) -> None:
    found = []
    for name in ("one", "two"):
        rows = list(csv.DictReader((runs[name] / "metrics.csv").read_text().splitlines()))
        keys = [(row["step"], row["name"]) for row in rows]
        assert len(keys) == len(set(keys))
        found.append({(r["step"], r["name"]): float(r["value"]) for r in rows})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        if key[1].startswith("loss/"):
            assert found[1][key] == pytest.approx(value, rel=2e-3), key


def test_the_processes_do_the_same_sums(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(SUMS)
    assert launch(2, script=str(script)).count("all the same") == 2


# Batch norm, queue and masks on two processes against one with the whole batch.
SUMS = """
import torch, torch.distributed as dist
from torch import nn
from squid_fast import MemoryQueue, ops
from squid_fast.training.distributed import SyncBatchNorm2d

dist.init_process_group("gloo")
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
dist.destroy_process_group()
print("all the same")
"""


def test_masks_differ_between_ranks_and_augmentation_does_not() -> None:
    from squid_fast.training.loop import _step_seed

    seeds = {_step_seed(3 - rank - 1, 17) for rank in range(8)} | {_step_seed(3, 17)}
    assert len(seeds) == 9
    batch = torch.arange(12)
    shares = [Processes(rank, 3, 3).share(batch) for rank in range(3)]
    assert torch.equal(torch.cat(shares), batch)


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match="shared out over 3 processes; a batch of 15 or 18"):
        Processes(0, 3, 3).check_batch(16)
    Processes(0, 4, 4).check_batch(16)


def test_the_verb_leaves_one_bundle(tmp_path: Path) -> None:
    for split, kinds in {"train": ("NORMAL",), "val": ("NORMAL", "PNEUMONIA")}.items():
        for kind in kinds:
            folder = tmp_path / "data" / split / kind
            folder.mkdir(parents=True)
            for index, image in enumerate(images(24).images):
                Image.fromarray(image[0].numpy()).save(folder / f"{index}.png")
    out = launch(
        2, "train", "--preset", "small", "--data", tmp_path / "data", "--out", tmp_path / "run",
        "--epochs", 1, "--batch-size", 8, "--device", "cpu", "--precision", "float32", "--json",
    )  # fmt: skip
    assert json.loads(out)["finished"]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "calibration.json", "checkpoint.pt", "config.json", "metrics.csv", "model.safetensors"
    }  # fmt: skip
    about = json.loads((tmp_path / "run/config.json").read_text())["about"]
    assert (about["training_images"], about["machine"]["processes"]) == (24, 2)
