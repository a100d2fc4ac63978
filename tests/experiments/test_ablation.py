"""Ablations: every variant trained alike, stopped and resumed, and the table made of it."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from squid_fast import PRESETS, SQUID, load_bundle
from squid_fast.cli import ablation as cli_ablation
from squid_fast.experiments.ablation import (
    VARIANTS,
    AblationData,
    as_markdown,
    changed_model,
    digit_data,
    evaluate_bundle,
    run_ablation,
    summarised,
)
from squid_fast.inference import Scorer
from squid_fast.training import CheckpointError
from tests.command_line import squid
from tests.factories import SIDE, TINY

PRESET = dataclasses.replace(PRESETS["small"], image_size=SIDE, model=TINY)
RECIPE = dataclasses.replace(PRESET.recipe, epochs=2, t_max=2, batch_size=8, validate_every=1)


@pytest.fixture(scope="module")
def data() -> AblationData:
    return digit_data(SIDE, 24, held_out=20)


def ablation(data: AblationData, out: Path, *variants: str, **others: Any) -> Any:
    common = {"recipe": RECIPE, "device": "cpu", "precision": "float32", "say": lambda text: None}
    return run_ablation(data, PRESET, out, variants=variants, **common | others)


def shapes(model: SQUID) -> dict[str, Any]:
    return {name: value.shape for name, value in model.state_dict().items()}


def test_every_variant_changes_what_it_says_in_every_preset() -> None:
    same = ("memory_matrix", "hard_shrinkage", "no_shortcut", "soft_shortcut")
    for preset in ("zhanglab", "digit_anatomy", "small"):
        model = PRESETS[preset].model
        full = shapes(SQUID(**model))
        for name in set(VARIANTS) - {"full"}:
            if preset == "zhanglab" and name == "convolution":
                continue  # 2048 x 2048 x 9 weights, which take a second to draw
            other = SQUID(**changed_model(model, name))
            assert (shapes(other) == full) == (name in same), name
            if name == "no_shortcut":
                ratios = {m.mask_ratio for m in other.modules() if hasattr(m, "mask_ratio")}
                assert ratios == {1.0}
    with pytest.raises(ValueError, match="variant is 'nothing'; known are full, one_memory"):
        changed_model(TINY, "nothing")


def test_a_stopped_ablation_goes_on_to_the_same_table(data: AblationData, tmp_path: Path) -> None:
    names = ["full", "no_inpainting", "one_memory"]
    whole = ablation(data, tmp_path / "whole", *names, seeds=2)
    order = [(name, seed) for seed in range(2) for name in names]
    assert [(run["variant"], run["seed"]) for run in whole["runs"]] == order
    part = partial(ablation, data, tmp_path / "part", *names)
    asked = iter(range(1000))  # in the second run the answer is yes
    assert part(seeds=2, should_stop=lambda: next(asked) >= 6) is None
    file = tmp_path / "part/ablation.json"
    saved = json.loads(file.read_text())
    assert len(saved["runs"]) == 1
    with pytest.raises(CheckpointError, match="already holds an ablation; add --resume"):
        part()
    with pytest.raises(CheckpointError, match="is of other settings"):
        part(resume=True, recipe=dataclasses.replace(RECIPE, lr=1.0))
    recipe = saved["settings"]["recipe"]
    recipe["averaging"] = recipe.pop("ema_decay")  # its name in earlier versions
    file.write_text(json.dumps(saved))
    resumed = part(seeds=2, resume=True)
    for run in whole["runs"] + resumed["runs"]:
        del run["seconds"]
    assert resumed["runs"] == whole["runs"]
    first = whole["runs"][0]
    assert first | evaluate_bundle(tmp_path / "whole/full-0", data, "cpu") == first
    model = load_bundle(tmp_path / "whole/one_memory-1").model
    assert model.config["inpainting"] == {"memory": "shared"}


def test_groups_are_the_normal_grids_and_one_kind(data: AblationData, tmp_path: Path) -> None:
    results = ablation(data, tmp_path, "full")
    scorer = Scorer.load(tmp_path / "full-0", device="cpu")
    kinds = [path.split("/")[0] for path in data.test.paths]
    raw = scorer.raw_scores(data.test)["reconstruction_error"].tolist()
    for kind, auroc in results["runs"][0]["auroc"]["reconstruction_error"].items():
        odd = [value for value, k in zip(raw, kinds, strict=True) if k == kind]
        calm = [value for value, k in zip(raw, kinds, strict=True) if k == "normal"]
        assert len(odd) == len(calm) == 20
        wins = sum((a > b) + 0.5 * (a == b) for a in odd for b in calm)
        assert auroc == pytest.approx(wins / 400, abs=1e-4)


def test_rows_are_means_with_spread_and_difference() -> None:
    def run(variant: str, seed: int, *values: float) -> dict[str, Any]:
        auroc = {"s": dict(zip("ab", values, strict=True))}
        return {"variant": variant, "seed": seed, "parameters": 7, "auroc": auroc}

    runs = [run("full", 0, 0.8, 0.9), run("full", 1, 0.6, 0.7), run("no_teacher", 0, 0.5, 0.6)]
    full, other = summarised({"runs": runs}, ["s"])
    assert full["auroc"]["s"] == pytest.approx(0.75)
    assert full["spread"]["s"] == pytest.approx(0.2 / 2**0.5)
    assert other["difference"]["s"] == pytest.approx(-0.2)
    assert other["spread"]["s"] is None
    table = as_markdown({"runs": runs}, ["s"]).splitlines()
    assert "0.750 ± 0.141 | 7 |" in table[2]
    assert "0.550 (-0.200)" in table[3]


def test_the_verb_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_ablation, "digit_data", partial(digit_data, held_out=20))
    options = ("--variants", "full,no_teacher", "--epochs", 1, "--grids", 16, "--device", "cpu")
    command = ("ablate", "--out", tmp_path / "out", *options)
    assert "no_teacher" in squid(*command).stdout
    assert "without the teacher" in (tmp_path / "out/ablation.md").read_text()
    again = squid(*command, check=False)
    assert again.returncode == 1
    assert "already holds an ablation" in again.stderr
