from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

# What is computed in these tests is small: threads would only wait for one another. Libraries read
# this when they are loaded, and so do the processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# Without it PyTorch warns of matrix products on a GPU where a test wants deterministic algorithms,
# and a warning is an error. cuBLAS reads it when it is first called.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.command_line import squid

# Without a GPU the kernels are tested in Triton's interpreter, which has to be chosen before Triton
# is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(os.environ.get("SQUID_FAST_SHARED") or Path(__file__).parents[2] / "shared")

# A pytest that a test starts is not one of the workers that share these tests out.
os.environ.pop("PYTEST_XDIST_WORKER", None)

torch.set_num_threads(1)  # where torch was loaded before

Golden = tuple[dict[str, str], dict[str, Tensor]]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden tensors and data, which is no part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is missing; SQUID_FAST_SHARED names another folder")
    return SHARED


@cache
def _read(path: Path) -> Golden:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="session")
def golden(shared: Path) -> Callable[[str], Golden]:
    """Reads a golden file: its metadata and its tensors."""
    return partial(_load, shared / "golden")


@pytest.fixture(scope="session")
def golden64(shared: Path) -> Callable[[str], Golden]:
    """Reads what the published implementation computes of a golden file in float64."""
    return partial(_load, shared / "golden64")


def _load(folder: Path, name: str) -> Golden:
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return _read(path)


@pytest.fixture(scope="session")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DigitAnatomy on disk, small, as the verb writes it."""
    folder = tmp_path_factory.mktemp("data") / "grids"
    squid("synth", folder, "--cell", 16, "--train", 12, "--val", 24, "--test", 8)
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in a test, whichever tests its process ran before."""
    torch.manual_seed(20230617)
