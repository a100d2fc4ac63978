"""Training: losses, step, schedule, augmentation, checkpoints, resumption, stops."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import squid_fast
from squid_fast import reference
from squid_fast.presets import Recipe
from squid_fast.training import (
    CheckpointError,
    NonFiniteLossError,
    Trainer,
    TrainingResult,
    learning_rate,
    loop,
    make_optimizers,
    squid,
    train,
    train_bundle,
)
from squid_fast.training.augment import augment
from squid_fast.training.checkpoint import load_checkpoint, save_checkpoint
from squid_fast.training.ema import EMA
from squid_fast.training.losses import discriminator_loss, generator_losses
from squid_fast.training.state import Run
from tests.factories import DECODER_MEMORY, image_batch, image_set, open_masks, tiny_squid
from tests.processor import needs_bf16

pytest.importorskip("lightning_fabric")

RECIPE = Recipe(batch_size=4, epochs=3, t_max=3, lr=1e-3, validate_every=2)


def tiny_model() -> squid_fast.SQUID:
    return tiny_squid(decoder_memory=DECODER_MEMORY)


def after_steps(count: int) -> Callable[[], bool]:
    asked = iter(range(1, 10_000))
    return lambda: next(asked) >= count


def logged(run: Path) -> list[tuple[str, str, str]]:
    """Rows (step, name, value) of a run's log but for those that no other run can repeat."""
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    return [(r["step"], r["name"], r["value"]) for r in rows if r["name"] != "time/minutes"]


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_same_pair(one: TrainingResult, other: TrainingResult) -> None:
    assert_same_state(one.model.state_dict(), other.model.state_dict())
    assert_same_state(one.discriminator.state_dict(), other.discriminator.state_dict())


# --- losses ---------------------------------------------------------------------------------------


def test_losses_are_those_of_the_reference() -> None:
    torch.manual_seed(0)
    images, recon, teacher = torch.rand(3, 2, 1, 8, 8).double()
    outputs = {"recon": recon, "teacher_recon": teacher, "dist_loss": torch.tensor(0.3).double()}
    logits, real = torch.randn(2, 1).double(), torch.randn(2, 1).double()
    recipe = Recipe(recon_w=7, g_w=0.2, t_w=0.3, dist_w=0.4, d_w=0.5)
    ours = sum(generator_losses(images, outputs, logits, recipe).values())
    theirs = reference.generator_loss(images, outputs, logits, 7, 0.2, 0.3, 0.4)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert float(discriminator_loss(real, logits, recipe)) == pytest.approx(
        float(reference.discriminator_loss(real, logits, 0.5)), rel=1e-6
    )


def test_the_teachers_terms_are_left_out_without_a_teacher() -> None:
    outputs = {"recon": torch.zeros(1, 1, 4, 4), "teacher_recon": None, "dist_loss": None}
    terms = generator_losses(torch.ones(1, 1, 4, 4), outputs, torch.zeros(1, 1), Recipe())
    assert terms.keys() == {"reconstruction", "adversarial"}
    assert float(terms["reconstruction"]) == pytest.approx(10.0)
    assert float(terms["adversarial"]) == pytest.approx(0.005 * math.log(2))


# --- step -----------------------------------------------------------------------------------------


def make_trainer(model: squid_fast.SQUID, recipe: Recipe) -> Trainer:
    torch.manual_seed(1)
    discriminator = squid_fast.Discriminator(2).train()
    optimizers = make_optimizers(model.train(), discriminator, recipe)
    return Trainer(model, discriminator, optimizers, recipe, lambda loss: loss.backward())


def test_a_step_moves_what_the_published_loop_moves() -> None:
    """One shared forward gives the parameters of a loop that runs the generator for each loss."""
    recipe = dataclasses.replace(RECIPE, n_critic=1, weight_decay=0.0)
    model, published = tiny_model(), tiny_model()
    open_masks(model, published)  # without draws the two forwards of the loop are the same
    trainer, other = make_trainer(model, recipe), make_trainer(published, recipe)
    images = image_batch(4)
    trainer.step(images, 0)

    recon = published(images)["recon"].detach()
    loss = discriminator_loss(other.discriminator(images), other.discriminator(recon), recipe)
    other.discriminator_optimizer.zero_grad()
    loss.backward()
    other.discriminator_optimizer.step()
    outputs = published(images)
    terms = generator_losses(images, outputs, other.discriminator(outputs["recon"]), recipe)
    other.generator_optimizer.zero_grad()
    sum(terms.values()).backward()
    other.generator_optimizer.step()
    for module in published.modules():
        if isinstance(module, squid_fast.MemoryQueue):
            module.update()

    assert_same_state(dict(model.named_parameters()), dict(published.named_parameters()))
    assert torch.equal(model.inpaint_block.memory.slots, published.inpaint_block.memory.slots)
    assert_same_state(trainer.discriminator.state_dict(), other.discriminator.state_dict())


def test_the_average_is_a_mean_at_first_and_an_exponential_one_later() -> None:
    torch.manual_seed(1)
    discriminator, model = squid_fast.Discriminator(2).train(), tiny_model().train()
    ema = EMA(discriminator, 0.75)
    optimizers = make_optimizers(model, discriminator, RECIPE)
    trainer = Trainer(model, discriminator, optimizers, RECIPE, Tensor.backward, ema)
    images = image_batch(4)
    expected = dict.fromkeys(discriminator.state_dict(), torch.zeros((), dtype=torch.float64))
    for index, share in enumerate((1, 1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4)):
        trainer.step(images, index)
        for name, value in discriminator.state_dict().items():
            expected[name] = (1 - share) * expected[name] + share * value.double()
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert not ema.module.training
    assert discriminator.training


def test_a_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema_decay is 1\.0; it must lie in \(0, 1\)"):
        EMA(squid_fast.Discriminator(2), 1.0)


def test_only_every_n_critic_th_batch_trains_the_generator() -> None:
    model = tiny_model()
    trainer = make_trainer(model, dataclasses.replace(RECIPE, n_critic=2))
    images = image_batch(4)
    losses = {"discriminator", "reconstruction", "adversarial", "teacher", "distillation"}
    assert trainer.step(images, 0).keys() == losses
    before = {name: p.clone() for name, p in model.named_parameters()}
    slots = model.inpaint_block.memory.slots.clone()
    discriminator = trainer.discriminator.regressor.weight.clone()
    assert trainer.step(images, 1).keys() == {"discriminator"}
    assert_same_state(before, dict(model.named_parameters()))
    assert torch.equal(slots, model.inpaint_block.memory.slots)
    assert not torch.equal(discriminator, trainer.discriminator.regressor.weight)


def test_the_cosine_schedule() -> None:
    recipe = Recipe(lr=2.0, t_max=10, lr_floor=0.1)
    assert learning_rate(recipe, 0) == pytest.approx(2.0)
    assert learning_rate(recipe, 5) == pytest.approx(1.1)
    assert learning_rate(recipe, 10) == pytest.approx(0.2)


# --- augmentation ---------------------------------------------------------------------------------


def test_augmentation_stays_within_its_bounds() -> None:
    images = torch.zeros(200, 1, 41, 41)
    images[:, :, 20, 20] = 1.0
    torch.manual_seed(0)
    moved = augment(images, shift=0.1, scale=0.0)
    weight = moved.sum(dim=(1, 2, 3))
    place = torch.arange(41.0)
    rows = (moved.sum(dim=(1, 3)) * place).sum(dim=1) / weight
    assert (rows - 20).abs().max() <= 0.1 * 41 + 1e-3
    assert (rows - 20).abs().max() > 0.08 * 41
    assert augment(images, 0.0, 0.0) is images


def test_augmentation_scales_about_the_centre() -> None:
    images = torch.zeros(100, 1, 64, 64)
    images[:, :, 16:48, 16:48] = 1.0
    torch.manual_seed(0)
    side = augment(images, shift=0.0, scale=0.25).sum(dim=(1, 2, 3)).sqrt() / 32
    assert 0.74 < side.min() < 0.80
    assert 1.20 < side.max() < 1.26


# --- the loop -------------------------------------------------------------------------------------


# Stops within an epoch, across one, just after a validation.
@pytest.mark.parametrize(("decay", "stops"), [(0.0, (2, 3, 1)), (0.9, (5,))])
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    decay: float, stops: tuple[int, ...], tmp_path: Path
) -> None:
    images, part = image_set(14), tmp_path / "part"
    recipe = dataclasses.replace(RECIPE, ema_decay=decay)
    data = {"recipe": recipe, "validation_set": image_set(12, anomalous=6)}
    whole = train(tiny_model(), images, tmp_path / "whole", **data)
    assert (whole.finished, whole.step) == (True, 9)
    for stop in stops:
        options = {"resume": part.exists(), "should_stop": after_steps(stop)}
        assert not train(tiny_model(), images, part, **data, **options).finished
    resumed = train(tiny_model(), images, part, resume=True, **data)
    assert resumed.finished
    assert_same_pair(whole, resumed)
    assert whole.model.inpaint_block.memory.ptr == resumed.model.inpaint_block.memory.ptr
    assert whole.validation == resumed.validation
    discriminator = {f"auroc_discriminator_{kind}" for kind in ("instance", "running", "image")}
    assert whole.validation.keys() == {*discriminator, "auroc_reconstruction_error"}
    log = logged(tmp_path / "whole")
    assert log == logged(part)
    kinds = {"validation", "unaveraged"} if decay else {"validation"}
    assert len(log) == 3 * 5 + 2 * 4 * len(kinds)
    rows = {name: float(value) for _, name, value in log}
    assert {name.split("/")[0] for name in rows} == kinds | {"loss"}
    assert {name: rows[f"validation/{name}"] for name in whole.validation} == whole.validation


def test_the_best_validated_pair_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    areas = iter([0.6, 0.8, 0.7, 0.6, 0.8, 0.7])
    name = "auroc_discriminator_instance"
    monkeypatch.setattr(squid, "validate", lambda *_: {name: next(areas)})
    recipe = dataclasses.replace(RECIPE, validate_every=1, keep="best")
    images, data = image_set(8), {"validation_set": image_set(4, anomalous=2)}
    best = train(tiny_model(), images, tmp_path / "best", recipe, **data)
    assert (best.epoch, best.step, best.validation) == (2, 6, {name: 0.8})
    after_two = load_checkpoint(tmp_path / "best/checkpoint.pt")["best"]
    second = train(tiny_model(), images, tmp_path / "two", recipe, should_stop=after_steps(4))
    assert not second.finished
    assert_same_pair(second, best)
    assert second.model.inpaint_block.memory.ptr == best.model.inpaint_block.memory.ptr
    assert_same_state(after_two["generator"], best.model.state_dict())

    part = tmp_path / "part"
    stopped = train(tiny_model(), images, part, recipe, should_stop=after_steps(5), **data)
    assert (stopped.epoch, stopped.validation) == (3, {name: 0.8})
    resumed = train(tiny_model(), images, part, recipe, resume=True, **data)
    assert (resumed.epoch, resumed.validation) == (2, {name: 0.8})
    assert_same_state(resumed.model.state_dict(), best.model.state_dict())


def test_without_validation_the_last_pair_is_kept(tmp_path: Path) -> None:
    images = image_set(8)
    last = train(tiny_model(), images, tmp_path / "last", RECIPE)
    recipe = dataclasses.replace(RECIPE, keep="best")
    best = train(tiny_model(), images, tmp_path / "best", recipe)
    assert best.epoch == last.epoch == 3
    assert_same_state(best.model.state_dict(), last.model.state_dict())


def test_averaging_leaves_training_itself_alone(tmp_path: Path) -> None:
    images = image_set(8)
    plain = train(tiny_model(), images, tmp_path / "plain", RECIPE)
    recipe = dataclasses.replace(RECIPE, ema_decay=0.9)
    averaged = train(tiny_model(), images, tmp_path / "averaged", recipe)
    live = load_checkpoint(tmp_path / "averaged/checkpoint.pt")["discriminator"]
    assert_same_state(plain.model.state_dict(), averaged.model.state_dict())
    assert_same_state(plain.discriminator.state_dict(), live)
    kept = averaged.discriminator.regressor.weight
    assert not torch.equal(live["regressor.weight"], kept)


def test_a_run_that_died_leaves_no_figures_twice(tmp_path: Path) -> None:
    images = image_set(8)
    train(tiny_model(), images, tmp_path, RECIPE, should_stop=after_steps(3))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,loss/discriminator,1.0\n")  # after the checkpoint of step 3
    train(tiny_model(), images, tmp_path, RECIPE, resume=True)
    rows = [(step, name) for step, name, _ in logged(tmp_path)]
    assert len(rows) == len(set(rows)) == 3 * 5


def test_training_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    model = tiny_model()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    train(model, image_set(8), tmp_path, RECIPE, should_stop=after_steps(1))
    assert torch.equal(torch.rand(1), expected)


def test_training_leaves_the_random_numbers_of_every_gpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = [5, 6]  # of two GPUs

    def seed_all(seed: int) -> None:
        seeds[:] = [seed, seed]

    for name, stand_in in {
        "device_count": lambda: 2,
        "get_rng_state": lambda device: seeds[device],
        "set_rng_state": lambda state, device: seeds.__setitem__(device, state),
        "manual_seed_all": seed_all,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    train_bundle(
        squid_fast.PRESETS["small"], image_set(4), tmp_path, recipe=Recipe(batch_size=2, epochs=1),
        device="cpu", precision="float32", false_positive_rate=0.25,
    )  # fmt: skip
    assert seeds == [5, 6]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, n_critic=1)
    zero, one = (
        train(tiny_model(), image_set(8), tmp_path / str(seed), recipe, seed=seed).model
        for seed in (0, 1)
    )
    assert not torch.equal(zero.out_conv.conv.weight, one.out_conv.conv.weight)


def test_a_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, validate_every=1)

    def poison(progress: squid_fast.training.Progress) -> None:
        if progress.step == 4:  # the end of an epoch, just saved
            with torch.no_grad():
                model.out_conv.conv.bias.fill_(math.nan)

    model = tiny_model()
    with pytest.raises(NonFiniteLossError, match=r"step 5: .*reconstruction is nan"):
        train(model, image_set(8), tmp_path, recipe, report=poison)
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    assert kept["step"] == 4
    assert all(value.isfinite().all() for value in kept["generator"].values())


def test_nothing_is_overwritten_and_foreign_runs_are_not_resumed(tmp_path: Path) -> None:
    images = image_set(8)
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        train(tiny_model(), images, tmp_path, RECIPE, resume=True)
    train(tiny_model(), images, tmp_path, RECIPE, should_stop=after_steps(1))
    with pytest.raises(CheckpointError, match="already holds a run; add --resume"):
        train(tiny_model(), images, tmp_path, RECIPE)
    other = dataclasses.replace(RECIPE, lr=5e-4)
    with pytest.raises(CheckpointError, match=r"recipe\.lr was 0\.001 and is 0\.0005"):
        train(tiny_model(), images, tmp_path, other, resume=True)
    longer = dataclasses.replace(RECIPE, epochs=4)
    assert train(tiny_model(), images, tmp_path, longer, resume=True).finished


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 training images, fewer than a batch of 4"):
        train(tiny_model(), image_set(3), tmp_path, RECIPE)
    with pytest.raises(ValueError, match="40 pixels wide; the model takes 48"):
        train(tiny_model(), image_set(8, 40), tmp_path, RECIPE)


# --- names and formats of earlier versions --------------------------------------------------------


def test_a_recipe_takes_the_former_name_of_the_decay() -> None:
    warns = partial(pytest.warns, DeprecationWarning, match="Recipe.averaging is now ema_decay")
    with warns():
        old = Recipe(batch_size=4, averaging=0.9)
    assert old == Recipe(batch_size=4, ema_decay=0.9)
    with warns():
        assert old.averaging == 0.9
    with warns():
        assert dataclasses.replace(old, averaging=0.5) == Recipe(batch_size=4, ema_decay=0.5)
    assert dataclasses.replace(old, lr=1.0).ema_decay == 0.9


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    images, recipe = image_set(8), dataclasses.replace(RECIPE, ema_decay=0.9)
    whole = train(tiny_model(), images, tmp_path / "whole", recipe)
    part = tmp_path / "part"
    train(tiny_model(), images, part, recipe, should_stop=after_steps(3))
    state = load_checkpoint(part / "checkpoint.pt")
    saved = state["settings"]["recipe"]
    saved["averaging"] = saved.pop("ema_decay")
    for name in ("to_validate", "threads"):  # which the first versions did not save
        del state[name]
    save_checkpoint(state, part / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"recipe\.ema_decay was 0\.9 and is 0\.0"):
        train(tiny_model(), images, part, RECIPE, resume=True)
    resumed = train(tiny_model(), images, part, recipe, resume=True)
    assert_same_pair(whole, resumed)


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_crash_while_saving_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"step": 1, "generator": {}}, path)

    def fail(state: object, file: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"step": 2, "generator": {}}, path)
    assert load_checkpoint(path)["step"] == 1


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"step": 1, "generator": Path}, path)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint written by squid-fast"):
        load_checkpoint(path)


@needs_bf16
def test_training_in_bf16_keeps_weights_in_float32(tmp_path: Path) -> None:
    images = image_set(8)
    whole, exact = (
        train(tiny_model(), images, tmp_path / name, RECIPE, precision=name)
        for name in ("bf16", "float32")
    )
    for name, value in whole.model.named_parameters():
        assert value.dtype == torch.float32, name
    log = (tmp_path / "bf16/metrics.csv").read_text()
    assert log != (tmp_path / "float32/metrics.csv").read_text()
    difference = whole.model.out_conv.conv.bias - exact.model.out_conv.conv.bias
    assert difference.abs().max() < 0.02


# --- the rate, and runs by the clock --------------------------------------------------------------


def test_the_rate_of_a_run_by_epochs_is_set_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(loop, "set_learning_rate", lambda _, rate: rates.append(rate))
    train(tiny_model(), image_set(8), tmp_path, RECIPE, should_stop=after_steps(3))
    train(tiny_model(), image_set(8), tmp_path, RECIPE, resume=True)  # from within the second
    assert rates == [learning_rate(RECIPE, epoch) for epoch in (0, 1, 1, 2)]


def by_the_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A step takes six seconds; the learning rates that are set."""
    rates: list[float] = []
    monkeypatch.setattr(Run, "minutes", property(lambda run: run._before + run.step / 10))
    monkeypatch.setattr(loop, "set_learning_rate", lambda _, rate: rates.append(rate))
    return rates


def test_a_run_by_the_clock_ends_in_time_and_its_rate_falls_to_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, seen = by_the_clock(monkeypatch), []
    recipe = dataclasses.replace(RECIPE, epochs=100, t_max=100, lr_floor=0.1)
    options = {"seconds": 60.0, "report": seen.append, "validation_set": image_set(6, anomalous=3)}
    result = train(tiny_model(), image_set(17), tmp_path, recipe, **options)
    assert (result.finished, result.step, result.epoch) == (True, 10, 3)
    expected = [learning_rate(recipe, 100 * step / 10) for step in range(10)]
    assert rates == pytest.approx(expected)
    assert [state.share for state in seen] == pytest.approx([step / 10 for step in range(1, 11)])
    assert {state.epochs for state in seen} == {None}
    # The last step ends the run within an epoch, which is logged and validated as any other.
    assert seen[-1].validation == result.validation
    assert result.validation.keys() >= {"auroc_reconstruction_error"}
    logged_at = {step for step, name, _ in logged(tmp_path) if name == "loss/reconstruction"}
    assert logged_at == {"4", "8", "10"}


def test_a_stop_is_the_end_of_a_run_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_the_clock(monkeypatch)
    stop = after_steps(2)
    result = train(tiny_model(), image_set(16), tmp_path, RECIPE, seconds=60.0, should_stop=stop)
    assert (result.finished, result.step) == (True, 2)


# --- a validation that fails ----------------------------------------------------------------------


@pytest.mark.parametrize("fails", [1, 2])
def test_a_run_whose_validation_fails_is_saved_before_and_goes_on_with_it(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, ema_decay=0.9, keep="best", validate_every=1)
    data = {"recipe": recipe, "validation_set": image_set(12, anomalous=6)}
    images, part = image_set(14), tmp_path / "part"
    whole = train(tiny_model(), images, tmp_path / "whole", **data)

    asked, works = iter(range(1, 100)), squid.validate

    def validate(*arguments: object) -> dict[str, float]:
        if next(asked) == fails:
            raise RuntimeError("could not create a primitive")
        return works(*arguments)

    monkeypatch.setattr(squid, "validate", validate)
    with pytest.raises(RuntimeError, match="primitive"):
        train(tiny_model(), images, part, **data)
    saved = load_checkpoint(part / "checkpoint.pt")
    assert (saved["step"], saved["to_validate"]) == (3, True)
    resumed = train(tiny_model(), images, part, resume=True, **data)
    assert resumed.finished
    assert (resumed.epoch, resumed.validation) == (whole.epoch, whole.validation)
    assert_same_pair(whole, resumed)
    assert logged(part) == logged(tmp_path / "whole")
