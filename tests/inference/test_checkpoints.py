"""Checkpoints and bundles as people have them: wrapped, copied in part, of other models."""

from __future__ import annotations

import argparse
import builtins
import io
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from squid_fast import PRESETS, SQUID, Bundle, Discriminator, Scorer, load_bundle, save_bundle
from squid_fast.inference.bundle import BundleError, load_published
from squid_fast.training.checkpoint import CheckpointError, load_checkpoint
from tests.factories import TINY, tiny_pair

PREFIXES = (
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "_forward_module.",
    "_forward_module._orig_mod.module.",
)


def prefixed(prefix: str, module: nn.Module) -> Any:
    """A state dict of a wrapper, with its metadata."""
    state = module.state_dict()
    found = OrderedDict((prefix + name, value) for name, value in state.items())
    found._metadata = {f"{prefix}{k}".rstrip("."): v for k, v in state._metadata.items()}
    return found


def wrapped_inside(model: SQUID) -> Any:
    """A state dict of a model whose parts were compiled."""
    model.down_blocks = torch.compile(model.down_blocks, backend="eager")
    for i, block in enumerate(model.up_blocks):
        model.up_blocks[i] = torch.compile(block, backend="eager")
    return model.state_dict()


def written(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def assert_same(model: nn.Module, source: nn.Module) -> None:
    expected = source.state_dict()
    assert list(model.state_dict()) == list(expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


# --- wrappers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_are_left_out(prefix: str) -> None:
    model, discriminator = tiny_pair()
    twin, other = SQUID(**TINY), Discriminator(2)
    twin.load_state_dict(prefixed(prefix, model))
    other.load_state_dict(prefixed(prefix, discriminator))
    assert_same(twin, model)
    assert_same(other, discriminator)
    assert int(twin.inpaint_block.memory.ptr) == 8  # of the metadata
    assign = SQUID(**TINY)
    assign.load_state_dict(prefixed(prefix, model), assign=True)
    assert_same(assign, model)


def test_wrappers_of_parts_are_left_out() -> None:
    model, twin = tiny_pair()[0], SQUID(**TINY)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    state = wrapped_inside(model)
    assert any("_orig_mod" in name for name in state)
    twin.load_state_dict(state)
    assert all(torch.equal(value, expected[name]) for name, value in twin.state_dict().items())


def test_an_average_is_a_model() -> None:
    model, twin = tiny_pair()[0], SQUID(**TINY)
    twin.load_state_dict(AveragedModel(model).state_dict())
    assert_same(twin, model)


def test_names_that_would_coincide_are_kept() -> None:
    model = SQUID(**TINY)
    both = {**model.state_dict(), **prefixed("module.", model)}
    with pytest.raises(
        RuntimeError, match=rf"{len(model.state_dict())} are unknown \('module\.in_conv"
    ):
        model.load_state_dict(both)


def holders(model: nn.Module, discriminator: nn.Module) -> dict[str, Any]:
    inside = {**prefixed("generator.", model), **prefixed("discriminator.", discriminator)}
    adam = torch.optim.Adam(model.parameters()).state_dict()
    return {
        "plain": model.state_dict(),
        "with figures": {**model.state_dict(), "epoch": 3, "loss": 0.5},
        "state_dict": {"epoch": 3, "state_dict": model.state_dict(), "optimizer": adam},
        "model_state_dict": {"model_state_dict": prefixed("module.", model), "loss": 0.5},
        "Lightning": {"state_dict": inside, "hyper_parameters": {"lr": 1e-3}, "callbacks": {}},
        "both": {"generator": model.state_dict(), "discriminator": discriminator.state_dict()},
        "sparse": {name: value.to_sparse() for name, value in model.state_dict().items()},
        "double": {k: v.double() for k, v in model.state_dict().items()},
    }


@pytest.mark.parametrize("name", holders(nn.Linear(1, 1), nn.Linear(1, 1)))
def test_published_checkpoints_in_other_dictionaries(name: str, tmp_path: Path) -> None:
    model, discriminator = tiny_pair()
    torch.save(holders(model, discriminator)[name], tmp_path / "g.pth")
    own = name in ("Lightning", "both")
    torch.save(discriminator.state_dict(), tmp_path / "d.pth")
    pair = load_published(tmp_path / "g.pth", tmp_path / ("g.pth" if own else "d.pth"), TINY)
    assert_same(pair[0], model)
    assert_same(pair[1], discriminator)


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    model, discriminator = tiny_pair()
    (tmp_path / "g.pth").write_bytes(save(dict(model.state_dict())))
    torch.save(discriminator.state_dict(), tmp_path / "d.pth")
    assert_same(load_published(tmp_path / "g.pth", tmp_path / "d.pth", TINY)[0], model)


# --- what cannot be read --------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456\n"
WHOLE = written({name: torch.ones(50) for name in "abc"})
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "pointer": (POINTER, r"it is a pointer of Git LFS; `git lfs pull` fetches"),
    "empty": (b"", r"it is empty; copy or download it again"),
    "page": (b"\n<!DOCTYPE html><html><title>Sign in</title>", r"it is a web page; download"),
    "half": (WHOLE[: len(WHOLE) // 2], r"it is cut short; copy or download it again"),
    "nearly all": (WHOLE[:-10], r"it is cut short; copy or download it again"),
    "noise": (bytes(range(1, 256)), r"it is damaged, or was not written by torch\.save"),
    "words": (b"hello\n" * 20, r"it is damaged, or was not written by torch\.save"),
    "a safetensors in part": (save({"a": torch.ones(9)})[:-5], r"it is cut short or damaged"),
    "a model": (
        written(nn.Linear(1, 1)),
        r"more than tensors \(torch\.nn\.modules\.linear\.Linear",
    ),
    "arguments": (
        written({"args": argparse.Namespace()}),
        r"more than tensors \(argparse\.Namespace\).*torch\.save\(model\.state_dict\(\), path\)",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_a_file_is_instead_is_said(name: str, tmp_path: Path) -> None:
    content, said = UNREADABLE[name]
    path = tmp_path / "g .pth"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=said) as published:
        load_published(path, path, TINY)
    with pytest.raises(CheckpointError, match=said) as resumed:
        load_checkpoint(path)
    save_bundle(Bundle(*tiny_pair()), tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=said) as bundled:
        load_bundle(tmp_path / "b")
    for caught in (published, resumed, bundled):
        assert len(str(caught.value)) < 400 + len(str(tmp_path))
        assert "\n" not in str(caught.value)


def forbid_all(path: Any, **how: Any) -> Any:
    raise PermissionError(13, "Permission denied", str(path))


def test_missing_is_told_from_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_bundle(Bundle(*tiny_pair()), tmp_path / "b")
    with pytest.raises(BundleError, match=r"none\.pth cannot be read .*: it is missing"):
        load_published(tmp_path / "none.pth", tmp_path / "none.pth", TINY)

    def forbid(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith((".pth", "model.safetensors", ".pt")):
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *args, **kwargs)

    open_file = builtins.open
    monkeypatch.setattr(builtins, "open", forbid)
    said = r"it may not be read, for lack of permission"
    for call, kind in (
        (lambda: load_published(tmp_path / "g.pth", tmp_path / "d.pth", TINY), BundleError),
        (lambda: load_bundle(tmp_path / "b"), BundleError),
        (lambda: load_checkpoint(tmp_path / "checkpoint.pt"), CheckpointError),
    ):
        with pytest.raises(kind, match=said):
            call()
    monkeypatch.setattr(os, "stat", forbid_all)
    with pytest.raises(BundleError, match="b may not be read, for lack of permission"):
        load_bundle(tmp_path / "b")


def test_blanks_around_a_name_are_shown(tmp_path: Path) -> None:
    for name in ("zhang ", " zhang", "zhang\n", "zha  ng"):
        with pytest.raises(BundleError) as caught:
            load_bundle(name)
        assert str(caught.value).startswith(f"{name!r} is not a folder")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pointer": (lambda b: (b / "config.json").write_bytes(POINTER), r"pointer of Git LFS"),
    "no content": (
        lambda b: (b / "config.json").write_bytes(b""),
        r"config\.json cannot be .*empty",
    ),
    "parts": (
        lambda b: (b / "config.json").write_text('{"format": 1}'),
        r"config\.json does not describe a model: it lacks 'model'\.",
    ),
    "few arguments": (
        lambda b: (b / "config.json").write_text('{"format": 1, "model": {"num_in_ch": 1}}'),
        r"it lacks 'features_root' and 'shrink_thres'\.",
    ),
    "a list": (
        lambda b: (b / "config.json").write_text('{"format": 1, "model": []}'),
        r"its parts have other types than squid_fast writes",
    ),
    "scores": (
        lambda b: (b / "calibration.json").write_text('{"scores": {"a": {"mean": 1}}}'),
        r"calibration\.json is damaged: it lacks 'std', 'threshold'",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_of_json(name: str, tmp_path: Path) -> None:
    damage, said = DAMAGES[name]
    save_bundle(Bundle(*tiny_pair()), tmp_path)
    damage(tmp_path)
    with pytest.raises(BundleError, match=said):
        load_bundle(tmp_path)


def test_a_bundle_of_a_wrapped_model_is_read(tmp_path: Path) -> None:
    model, discriminator = tiny_pair()
    save_bundle(Bundle(model, discriminator), tmp_path)
    state = {name: value.clone() for name, value in prefixed("module._orig_mod.", model).items()}
    save_file(state, tmp_path / "model.safetensors")
    mark = (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + mark)  # of an editor on Windows
    assert_same(load_bundle(tmp_path).model, model)


# --- what does not fit ----------------------------------------------------------------------------


def small() -> SQUID:
    return SQUID.from_preset("small")


def misfits() -> dict[str, tuple[Any, Any, str]]:
    """By name: a generator's checkpoint, a discriminator's, and what is said."""
    model, discriminator = small(), Discriminator(2)
    state, other = model.state_dict(), discriminator.state_dict()
    bias = "out_conv.conv.bias"
    return {
        "preset": (SQUID.from_preset("digit_anatomy").state_dict(), other, "The preset 'digit_ana"),
        "no preset": (
            small_with(num_slots=20).state_dict(),
            other,
            r"9 have another shape \('inpaint_block\.memory\.0\.memMatrix': \[20, 128\] in place "
            r"of \[200, 128\], \.\.\.\)\. It fits no preset",
        ),
        "exchanged": (other, state, r"It is the state dict of a Discriminator\.$"),
        "two generators": (state, state, r"28 entries are missing .*It is the state dict of a SQ"),
        "size": (
            state,
            Discriminator(4).state_dict(),
            r"Discriminator\(size=4\), for images of 128",
        ),
        "part": (
            {name: value for name, value in state.items() if name != bias},
            other,
            r"1 entry is missing \('out_conv\.conv\.bias'\)\.$",
        ),
        "more": ({**state, "foo": torch.ones(1)}, other, r"1 is unknown \('foo'\)\.$"),
        "others": (nn.Linear(1, 1).state_dict(), other, r"216 entries are missing .*; 2 are unkn"),
        "a tensor": (torch.ones(2), other, r"holds no state dict; a dictionary of tensors"),
        "run": (
            {"step": 1, "settings": {}, "generator": state, "optimizers": []},
            other,
            r"is the checkpoint of a run of squid-fast train, which --resume goes on with",
        ),
        "two": (
            {"generator": state, "average": state},
            other,
            r"holds several models, 'generator', 'average'; save the state dict of one",
        ),
        "int8": (
            {**state, bias: state[bias].to(torch.int8)},
            other,
            r"holds torch\.int8 in 'out_c",
        ),
        "no values": (
            {**state, bias: state[bias].to("meta")},
            other,
            r"1 is no tensor with values \('out_",
        ),
        "too large": ({**state, bias: state[bias].double() + 1e300}, other, r"NaN or infinite wei"),
    }


def flipped(content: bytes, place: int) -> bytes:
    """The content with one bit of one byte turned over."""
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_bit_that_has_turned_over_is_noticed(tmp_path: Path, share: float) -> None:
    model, discriminator = tiny_pair()
    save_bundle(Bundle(model, discriminator), tmp_path)
    torch.save(model.state_dict(), tmp_path / "g.pth")
    torch.save(discriminator.state_dict(), tmp_path / "d.pth")
    calls: dict[str, Callable[[], object]] = {
        "model.safetensors": lambda: load_bundle(tmp_path),
        "g.pth": lambda: load_published(tmp_path / "g.pth", tmp_path / "d.pth", TINY),
    }
    for name, load in calls.items():
        load()
        path = tmp_path / name
        path.write_bytes(flipped(path.read_bytes(), int(share * path.stat().st_size)))
        with pytest.raises(BundleError, match=rf"{name} .*damaged; copy or download it again\.$"):
            load()


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    model, discriminator = tiny_pair()
    save_bundle(Bundle(model, discriminator), tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # as of other programs
    assert_same(load_bundle(tmp_path).model, model)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(model.state_dict(), tmp_path / "g.pth")
    torch.serialization.set_crc32_options(before)
    torch.save(discriminator.state_dict(), tmp_path / "d.pth")
    assert_same(load_published(tmp_path / "g.pth", tmp_path / "d.pth", TINY)[0], model)


def test_what_else_is_an_archive_is_named(tmp_path: Path) -> None:
    torch.save(Discriminator(2).state_dict(), tmp_path / "d.pth")
    with zipfile.ZipFile(tmp_path / "g.pth", "w") as archive:
        archive.write(tmp_path / "d.pth", "weights/d.pth")
    with pytest.raises(
        BundleError, match=r"archive of other things \('weights/d\.pth', \.\.\.\); "
    ):
        load_published(tmp_path / "g.pth", tmp_path / "d.pth", TINY)
    with pytest.raises(BundleError, match=r"plain tensors: it is a folder; a file in it would fit"):
        load_published(tmp_path, tmp_path / "d.pth", TINY)


def test_no_weights_can_come_from_the_meta_device(tmp_path: Path) -> None:
    model, discriminator = tiny_pair()
    save_bundle(Bundle(model, discriminator), tmp_path)
    torch.save(model.state_dict(), tmp_path / "g.pth")
    torch.save(discriminator.state_dict(), tmp_path / "d.pth")
    with torch.device("meta"):  # as torch.set_default_device would
        loaded = load_bundle(tmp_path)
        published = load_published(tmp_path / "g.pth", tmp_path / "d.pth", TINY)
        empty = SQUID(**TINY)
    assert_same(loaded.model, model)
    assert_same(loaded.discriminator, discriminator)
    assert_same(published[0], model)
    with pytest.raises(ValueError, match=r"^a module is on the meta device, without values; load"):
        Scorer(empty, discriminator)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"foo": 3}, r"this version of squid_fast does not know its 'foo'\.$"),
        ({"level": "2"}, r"its parts have other types than squid_fast writes\.$"),
        ({"level": 9}, r"level is 9; it must lie between 1 and 5\.$"),
    ],
)
def test_a_configuration_that_is_none_is_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(BundleError, match=rf"^the configuration describes no model: {said}"):
        load_published(tmp_path / "g.pth", tmp_path / "d.pth", TINY | change)


def test_what_is_no_state_dict_is_named() -> None:
    model, twin = SQUID(**TINY), SQUID(**TINY)
    state = model.state_dict()
    for wrong, kind in (("g.pth", "str"), (None, "NoneType"), (model, "SQUID"), ({1: 2}, "dict")):
        with pytest.raises(TypeError, match=rf"^the state dict is of the type {kind}; a dictiona"):
            twin.load_state_dict(wrong)
    whole = {"epoch": 3, "steps": {1: 2}, "net": {f"module.{k}": v for k, v in state.items()}}
    with pytest.raises(RuntimeError, match=r"3 are unknown .*\. Its entry 'net' would fit$"):
        twin.load_state_dict(whole)
    for ending, count in (("memMatrix", 4), ("out_conv.conv.bias", 1)):
        for change in (lambda value: value.to("meta"), lambda value: value.numpy()):
            changed = {k: change(v) if k.endswith(ending) else v for k, v in state.items()}
            verb = "is no tensor" if count == 1 else "are no tensors"
            with pytest.raises(RuntimeError, match=rf"SQUID: {count} {verb} with values \('"):
                twin.load_state_dict(changed)


def small_with(**changes: Any) -> SQUID:
    return SQUID.from_preset("small", **changes)


def test_what_does_not_fit_is_said_in_short(tmp_path: Path) -> None:
    for name, (generator, discriminator, said) in misfits().items():
        torch.save(generator, tmp_path / "g.pth")
        torch.save(discriminator, tmp_path / "d.pth")
        with pytest.raises(BundleError, match=said) as caught:
            load_published(tmp_path / "g.pth", tmp_path / "d.pth", PRESETS["small"].model)
        assert len(str(caught.value)) < 400 + len(str(tmp_path)), name
        assert "\n" not in str(caught.value)


def test_load_state_dict_says_it_in_short_too() -> None:
    with pytest.raises(
        RuntimeError, match=r"this SQUID: 62 entries are .*The preset 'small'"
    ) as caught:
        SQUID.from_preset("zhanglab").load_state_dict(small().state_dict())
    assert len(str(caught.value)) < 400
    with pytest.raises(
        RuntimeError, match=r"^the state dict does not fit this Discriminator: 1 ha"
    ):
        Discriminator(2).load_state_dict(Discriminator(3).state_dict())
    found = SQUID(**TINY).load_state_dict({"foo": torch.ones(1)}, strict=False)
    assert found.unexpected_keys == ["foo"]
