"""What a user meets first: importing without the extras, missing extras, what is exported."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import squid_fast

ROOT = Path(__file__).parents[1]

WITHOUT_EXTRAS = """
import sys
for name in (
    "triton lightning_fabric sklearn matplotlib PIL pydicom imagecodecs pyarrow jinja2 rich typer "
    "tensorboard"
).split():
    sys.modules[name] = None
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_model_needs_no_optional_dependency_and_no_triton() -> None:
    done = run(
        "-c",
        f"{WITHOUT_EXTRAS}import torch, squid_fast\n"
        "model = squid_fast.SQUID.from_preset('small').eval()\n"
        "print(tuple(model(torch.rand(2, 1, 48, 48))['recon'].shape))\n",
    )
    assert done.stdout == "(2, 1, 48, 48)\n", done.stderr


def test_a_missing_extra_is_named() -> None:
    done = run("-c", f"{WITHOUT_EXTRAS}import squid_fast.__main__ as m; m.main()")
    assert done.returncode == 1
    assert 'pip install "squid-fast[screen]"' in done.stderr
    assert "Traceback" not in done.stderr
    reader = run(
        "-c",
        f"{WITHOUT_EXTRAS}from squid_fast.data import read_image\n"
        "import pathlib, tempfile\n"
        "path = pathlib.Path(tempfile.mkdtemp()) / 'a.png'\n"
        "path.write_bytes(b'\\x89PNG\\r\\n\\x1a\\n')\n"
        "try:\n    read_image(path)\nexcept ImportError as error:\n    print(error)\n",
    )
    assert 'pip install "squid-fast[screen]"' in reader.stdout, reader.stderr


def test_everything_exported_exists() -> None:
    for package in (squid_fast, squid_fast.data, squid_fast.screening):
        assert set(package.__all__) <= set(dir(package))
        for name in package.__all__:
            assert getattr(package, name) is not None


# What version 0.1.0 exported before its modules moved.
EXPORTED = {
    "squid_fast": "PRESETS SQUID Bundle Discriminator InpaintBlock MemoryMatrix MemoryQueue Preset "
    "Recipe Scorer Scores __version__ calibrate load_bundle ops save_bundle screen",
    "squid_fast.comparison": "METHODS RECIPE ComparisonScorer MethodResult load_scorer "
    "train_method",
    "squid_fast.data": "IMAGE_SUFFIXES KINDS LAYOUTS MAX_PIXELS DigitAnatomy DigitGrids "
    "DigitSourceError ImageReadError ImageSet LayoutError Record find_records load_image "
    "load_images read_image select write_digit_anatomy",
    "squid_fast.evaluation": "Evaluation OperatingPoint best_test_accuracy "
    "bootstrap_auroc_interval evaluate image_auprc image_auroc operating_point plot_roc "
    "threshold_at_false_positive_rate",
    "squid_fast.inference": "AGREEMENT Scorer Scores calibrate check_hardware",
    "squid_fast.modules": "SQUID Discriminator InpaintBlock MemoryMatrix MemoryQueue ScoreMode "
    "discriminator_size",
    "squid_fast.ops": "gumbel_shrinkage hard_shrinkage masked_shortcut memory_lookup "
    "neighbourhood_attention",
    "squid_fast.screening": "COLUMNS JournalError Packed ScreenRow Summary check_folder "
    "check_output find_files pack read_list screen screen_to_table summarise utf8_text "
    "write_report write_table",
    "squid_fast.training": "CheckpointError NonFiniteLossError Progress Trainer TrainingResult "
    "check_apart contaminated learning_rate load_splits make_optimizers train train_bundle",
}


@pytest.mark.filterwarnings("ignore:squid_fast:DeprecationWarning")
@pytest.mark.parametrize("package", EXPORTED)
def test_what_was_exported_still_is(package: str) -> None:
    for name in EXPORTED[package].split():
        assert getattr(importlib.import_module(package), name) is not None


def test_screening_through_ray_is_where_it_was() -> None:
    pytest.importorskip("ray", reason='Ray is not installed: pip install "squid-fast[ray]"')
    assert callable(importlib.import_module("squid_fast.screening.ray").screen_with_ray)


def test_the_top_of_the_package_is_a_short_list() -> None:
    entries = {path.name for path in (ROOT / "squid_fast").iterdir() if not path.is_symlink()}
    assert len(entries - {"py.typed", "__pycache__"}) <= 15


def test_imports_within_the_package_are_relative() -> None:
    for folder in ("squid_fast", "kernels", "reference"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                absolute = [name for name in names if name.split(".")[0] == "squid_fast"]
                assert not absolute, (path, node.lineno)


def test_names_are_imported_when_they_are_used() -> None:
    """Processes that read files would wait for torch, and hold it."""
    done = run("-c", LAZY)
    assert done.returncode == 0, done.stderr


LAZY = """
import sys

import squid_fast.data.readers, squid_fast.screening.reading.pool
import squid_fast, squid_fast.data, squid_fast.screening
assert not {"torch", "PIL", "pydicom", "imagecodecs", "pyarrow"} & set(sys.modules)
assert squid_fast.data.MAX_PIXELS == 100_000_000
assert {"ops", "screen", "SQUID"} <= set(dir(squid_fast))
assert "torch" not in sys.modules

try:
    squid_fast.screens
except AttributeError as error:
    assert str(error) == "module 'squid_fast' has no attribute 'screens'"
else:
    raise AssertionError("there is no such name")

import pickle
calibration = squid_fast.inference.scores.Calibration({}, [1.0], [2.0], "training")
assert pickle.loads(pickle.dumps(calibration)) == calibration
assert pickle.loads(pickle.dumps(squid_fast.Scores)) is squid_fast.inference.Scores
assert squid_fast.ops.memory_lookup is sys.modules["squid_fast.ops"].memory_lookup

from squid_fast import *
from squid_fast.data import *
assert SQUID is squid_fast.modules.SQUID
assert load_image is sys.modules["squid_fast.data.readers"].load_image
assert {*squid_fast.__all__, *squid_fast.data.__all__} <= set(globals())
"""


def test_every_folder_with_modules_is_packaged() -> None:
    """A folder that is missing in pyproject.toml would be missing in the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    for init in [*ROOT.glob("squid_fast/**/__init__.py"), ROOT / "kernels/__init__.py"]:
        package = ".".join(init.parent.relative_to(ROOT).parts)
        name = package if package.startswith("squid_fast") else f"squid_fast.{package}"
        assert f'"{name}"' in text, name


def test_reference_stands_alone() -> None:
    for path in (ROOT / "reference").glob("*.py"):
        assert "squid_fast" not in path.read_text(), path


def test_figures_in_documents_are_the_measured_ones() -> None:
    done = run("-m", "bench", "pages", "--check")
    assert done.returncode == 0, done.stderr


def test_the_drop_in_example_of_the_readme_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(example, names)
    assert names["scores"].shape == (16,)
