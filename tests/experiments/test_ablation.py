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

BASE = PRESETS["small"]
TINY = dataclasses.replace(
    BASE, image_size=48, model={**BASE.model, "features_root": 4, "memory_channel": 64,
                                "level": 2, "ops": ["none", "none"], "decoder_memory": [None] * 2,
                                "num_slots": 12},
)  # fmt: skip
RECIPE = dataclasses.replace(BASE.recipe, epochs=2, t_max=2, batch_size=8, validate_every=1)


@pytest.fixture(scope="module")
def data() -> AblationData:
    return digit_data(48, 24, held_out=20)


def options(**others: Any) -> dict[str, Any]:
    common = {"recipe": RECIPE, "device": "cpu", "precision": "float32"}
    return {**common, "say": lambda text: None, **others}


def test_every_variant_changes_what_it_says_in_every_preset() -> None:
    for preset in ("zhanglab", "digit_anatomy", "small"):
        full = SQUID(**PRESETS[preset].model)
        shapes = {k: v.shape for k, v in full.state_dict().items()}
        for name in set(VARIANTS) - {"full"}:
            if preset == "zhanglab" and name == "convolution":
                continue  # 2048 x 2048 x 9 weights, which take a second to draw
            other = SQUID(**changed_model(PRESETS[preset].model, name))
            differs = shapes != {k: v.shape for k, v in other.state_dict().items()}
            same = ("memory_matrix", "hard_shrinkage", "no_shortcut", "soft_shortcut")
            assert differs == (name not in same), name
        open_ = SQUID(**changed_model(PRESETS[preset].model, "no_shortcut"))
        ratios = {m.mask_ratio for m in open_.modules() if hasattr(m, "mask_ratio")}
        assert ratios == {1.0}
    with pytest.raises(ValueError, match="variant is 'nothing'; known are full, one_memory"):
        changed_model(BASE.model, "nothing")


def test_a_stopped_ablation_goes_on_to_the_same_table(data: AblationData, tmp_path: Path) -> None:
    names = ["full", "no_inpainting", "one_memory"]
    whole = run_ablation(data, TINY, tmp_path / "whole", **options(variants=names, seeds=2))
    assert whole is not None
    assert [(run["variant"], run["seed"]) for run in whole["runs"]] == [
        (name, seed) for seed in range(2) for name in names
    ]
    part = tmp_path / "part"
    asked = iter(range(1000))
    stop = {"should_stop": lambda: next(asked) >= 6}  # in the second run
    assert run_ablation(data, TINY, part, **options(variants=names, seeds=2, **stop)) is None
    assert len(json.loads((part / "ablation.json").read_text())["runs"]) == 1
    with pytest.raises(CheckpointError, match="already holds an ablation; add --resume"):
        run_ablation(data, TINY, part, **options(variants=names))
    recipe = dataclasses.replace(RECIPE, lr=1.0)
    with pytest.raises(CheckpointError, match="is of other settings"):
        run_ablation(data, TINY, part, **options(variants=names, resume=True, recipe=recipe))
    saved = json.loads((part / "ablation.json").read_text())
    recipe = saved["settings"]["recipe"]
    recipe["averaging"] = recipe.pop("ema_decay")  # its name in earlier versions
    (part / "ablation.json").write_text(json.dumps(saved))
    resumed = run_ablation(data, TINY, part, **options(variants=names, seeds=2, resume=True))
    assert resumed is not None

    def figures(results: dict[str, Any]) -> list[Any]:
        return [{k: v for k, v in run.items() if k != "seconds"} for run in results["runs"]]

    assert figures(resumed) == figures(whole)
    first = whole["runs"][0]
    assert first | evaluate_bundle(tmp_path / "whole/full-0", data, "cpu") == first
    model = load_bundle(tmp_path / "whole/one_memory-1").model
    assert model.config["inpainting"] == {"memory": "shared"}


def test_groups_are_the_normal_grids_and_one_kind(data: AblationData, tmp_path: Path) -> None:
    results = run_ablation(data, TINY, tmp_path, **options(variants=["full"]))
    assert results is not None
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
    command = (
        "ablate", "--out", tmp_path / "out", "--variants", "full,no_teacher", "--epochs", 1,
        "--grids", 16, "--device", "cpu",
    )  # fmt: skip
    done = squid(*command)
    assert "no_teacher" in done.stdout
    table = (tmp_path / "out/ablation.md").read_text()
    assert "without the teacher" in table
    again = squid(*command, check=False)
    assert again.returncode == 1
    assert "already holds an ablation" in again.stderr
