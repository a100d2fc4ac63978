"""How memories are used, against counts one by one, and the pictures of a run."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from squid_fast import SQUID
from squid_fast.experiments.diagnostics import MemoryUse, TrainingSnapshots, draw_memory, memory_use
from tests.command_line import squid
from tests.factories import DECODER_MEMORY, image_batch, image_set, tiny_squid


def model(**others: Any) -> SQUID:
    return tiny_squid(num_slots=7, decoder_memory=DECODER_MEMORY, **others)


def test_hits_and_similarities_are_those_counted_one_by_one() -> None:
    network, own = model(), image_set(9)
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    uses = memory_use(network, own)
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert network.training
    assert network.inpaint_block.memory.pending is None
    kinds = {name: use.kind for name, use in uses.items()}
    assert kinds == {"inpaint_block.memory": "queue", "memory_blocks.1.memory": "matrix"}

    asked: dict[str, np.ndarray] = {}
    for name in uses:
        network.get_submodule(name).register_forward_pre_hook(
            lambda m, given, name=name: asked.__setitem__(name, given[0].numpy())
        )
    with torch.no_grad():
        network.eval()(own.batch(slice(None)))
    for name, use in uses.items():
        slots = network.get_submodule(name).slots.detach().numpy()
        hits = np.zeros(slots.shape[:2], dtype=int)
        nearest = np.full(slots.shape[:2], -1.0)
        for vectors in asked[name]:
            for n, vector in enumerate(vectors):
                scores = slots[n] @ vector
                hits[n, np.argsort(-scores)[:2]] += 1  # k = 3 keeps two
                norms = np.linalg.norm(slots[n], axis=1) * np.linalg.norm(vector)
                nearest[n] = np.maximum(nearest[n], scores / norms)
        assert np.array_equal(use.hits, hits)
        np.testing.assert_allclose(use.similarity, nearest, atol=1e-5)


def test_dead_and_effective_slots() -> None:
    hits = np.array([[4, 4, 0, 0], [2, 2, 2, 2], [8, 0, 0, 0]])
    use = MemoryUse("queue", hits, np.zeros((3, 4), dtype=np.float32))
    assert use.dead_share == pytest.approx(5 / 12)
    assert use.effective_slots == pytest.approx([2.0, 4.0, 1.0])


@pytest.mark.parametrize(("memory", "kind", "N"), [("shared", "queue", 1), ("matrix", "matrix", 4)])
def test_variants_are_looked_into_as_well(memory: str, kind: str, N: int) -> None:
    use = memory_use(model(inpainting={"memory": memory}), image_set(5))["inpaint_block.memory"]
    assert (use.kind, len(use.hits)) == (kind, N)
    assert use.hits.sum(axis=1).tolist() == [2 * 4 * 5 // N] * N  # two a patch


def test_without_in_painting_the_decoder_is_left() -> None:
    uses = memory_use(model(inpainting=False), image_set(5))
    assert uses.keys() == {"memory_blocks.1.memory"}


def test_a_queue_of_real_features_lies_close_to_them() -> None:
    network = model()
    with torch.no_grad():
        network(image_batch(7))
    memory = network.inpaint_block.memory
    memory.update()

    def similarity() -> float:
        return memory_use(network, image_set(7))["inpaint_block.memory"].figures()["similarity"]

    filled = similarity()
    torch.manual_seed(1)
    memory.slots.uniform_(-0.1, 0.1)
    assert filled > similarity() + 0.1


def test_a_run_keeps_its_pictures_over_a_resumption(tmp_path: Path) -> None:
    held_out = image_set(12, anomalous=6)
    network = model()
    figures = TrainingSnapshots(tmp_path, held_out).add(network, 1)
    named = itertools.product(("dead_share", "similarity"), ("queue", "matrix"))
    assert figures.keys() == {f"memory/{figure}_{kind}" for figure, kind in named}
    use = memory_use(network, held_out)["inpaint_block.memory"]
    assert figures["memory/dead_share_queue"] == pytest.approx(use.dead_share)
    again = TrainingSnapshots(tmp_path, held_out)
    again.add(network, 9)  # of a run that died after its checkpoint of epoch 3
    again.add(network, 3)
    strips = np.load(tmp_path / "pictures/reconstructions.npz")
    assert sorted(strips) == ["00002", "00004"]
    shown = again.shown
    assert shown.labels.tolist() == [0, 0, 1, 1]
    with torch.no_grad():
        recon = network.eval()(shown.batch(slice(None)))["recon"][:, 0]
    np.testing.assert_allclose(strips["00004"], recon.numpy() * 255, atol=0.51)
    for name in ("reconstructions.png", "memory.png"):
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    table = json.loads((tmp_path / "pictures/memory.json").read_text())
    assert table["inpaint_block.memory"]["slots"] == 7


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no memories"):
        draw_memory({}, tmp_path / "x.png")


def test_training_and_the_verb_draw(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / "data" / split / "NORMAL"
        folder.mkdir(parents=True)
        for i, image in enumerate(image_set(20).images):
            Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    data, run = ("--data", tmp_path / "data"), tmp_path / "run"
    options = ("--preset", "small", "--epochs", 1, "--batch-size", 10, "--device", "cpu")
    squid("train", *data, "--out", run, *options)
    assert (run / "pictures/reconstructions.png").exists()
    assert "memory/similarity_queue" in (run / "metrics.csv").read_text()
    done = squid("diagnose", run, *data, "--out", tmp_path / "look", "--json")
    assert json.loads(done.stdout)["inpaint_block.memory"]["places"] == 9
    assert (tmp_path / "look/memory.png").exists()
