"""Former import paths: the same modules and names, with one warning that says where they are."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest

import squid_fast.screening
import squid_fast.utils.outputs
from squid_fast.utils.moved import MOVED, moved_names

SUBMODULE = "squid_fast.comparison.scorer"


@pytest.fixture(autouse=True)
def not_yet_imported() -> Iterator[None]:
    """Former paths are as in a new process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*MOVED, SUBMODULE):
            patch.delitem(sys.modules, name, raising=False)
        yield


@pytest.mark.parametrize("former", [*MOVED, SUBMODULE])
def test_a_former_path_is_the_module_of_today(former: str) -> None:
    today = MOVED.get(former, "squid_fast.experiments.baselines.scorer")
    module = importlib.import_module(today)
    spec, loader = module.__spec__, module.__loader__
    parent = MOVED.get(former.rpartition(".")[0])
    with pytest.warns(DeprecationWarning, match="is now") as caught:
        assert importlib.import_module(former) is module
    said = [str(warning.message) for warning in caught]
    assert said[-1] == f"{former} is now {today}"
    assert len(said) == (2 if parent else 1)
    assert (module.__name__, module.__spec__, module.__loader__) == (today, spec, loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module(former) is module


def test_the_warning_names_the_line_that_imports() -> None:
    with pytest.warns(DeprecationWarning, match="is now") as caught:
        import squid_fast.evaluation  # noqa: F401
    assert [warning.filename for warning in caught] == [__file__]


def test_a_former_module_is_an_attribute_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(squid_fast, "evaluation", raising=False)
    with pytest.warns(DeprecationWarning, match="evaluation is now squid_fast.metrics"):
        assert squid_fast.evaluation is importlib.import_module("squid_fast.metrics")


def test_a_path_that_never_was_is_not_found() -> None:
    for name in ("squid_fast.comparisons", "squid_fast.evaluation_of"):
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
            importlib.import_module(name)


def test_a_pickle_of_an_earlier_version_is_read() -> None:
    calibration = squid_fast.inference.scores.Calibration({}, [1.0], [2.0], "training")
    today = pickle.dumps(calibration, protocol=0)
    with pytest.warns(DeprecationWarning, match=r"squid_fast.scores is now"):
        former = pickle.loads(today.replace(b"squid_fast.inference.scores", b"squid_fast.scores"))
    assert former == calibration


def test_threads_that_import_at_once_get_one_module_whole() -> None:
    code = (
        "import importlib, warnings\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "warnings.simplefilter('ignore')\n"
        "names = ['squid_fast.evaluation', 'squid_fast.metrics'] * 8\n"
        "with ThreadPoolExecutor(16) as pool:\n"
        "    (module,) = set(pool.map(importlib.import_module, names))\n"
        "assert callable(module.plot_roc)\n"
        "assert module.__spec__.name == 'squid_fast.metrics'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_moved_name_is_that_of_today() -> None:
    package = type(sys)("package_of_this_test")
    package.__getattr__ = moved_names("package", {"area": "squid_fast.metrics.image_auroc"})
    with pytest.warns(DeprecationWarning, match="package.area is now squid_fast.metrics.image_aur"):
        assert package.area is squid_fast.metrics.image_auroc
    with pytest.raises(AttributeError, match="module 'package' has no attribute 'b'"):
        _ = package.b


def test_a_package_of_lazy_names_has_moved_ones_too() -> None:
    match = "screening.check_folder is now squid_fast.utils.outputs.check_file"
    with pytest.warns(DeprecationWarning, match=match) as caught:
        assert squid_fast.screening.check_folder is squid_fast.utils.outputs.check_file
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(AttributeError, match="has no attribute 'check_folders'"):
        _ = squid_fast.screening.check_folders
