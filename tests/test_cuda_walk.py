"""What scoring and training would do on an NVIDIA card, walked through on one that is not there.

The walk has a process of its own: PyTorch is to see a card there, and Triton not to interpret.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rich")
pytest.importorskip("lightning_fabric")

TESTS = Path(__file__).parent
COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch asks CUDA itself"),
    pytest.mark.skipif(COMPILER is None, reason="there is no g++"),
]

# With the launches that each takes, images and steps captured; more would be slower than it was.
WALKS = {
    ("score", "zhanglab", "bf16", 16, "uint8"): 90,
    ("score", "zhanglab", "bf16", 16, "float32"): 87,
    ("train", "zhanglab", "bf16", 16): 1060,
    ("train", "digit_anatomy", "float32", 4): 830,
}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Launches and problems of every walk."""
    library, torch_path = tmp_path_factory.mktemp("card") / "card.so", Path(torch.__file__).parent
    libraries = torch_path / "lib"
    subprocess.run(
        [
            str(COMPILER), "-std=c++20", "-shared", "-fPIC", str(TESTS / "absent_card.cpp"),
            "-o", str(library), f"-I{torch_path / 'include'}", f"-L{libraries}", "-ltorch_cpu",
            "-lc10", f"-Wl,-rpath,{libraries}",
        ],
        check=True,
    )  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda_walk"],
        input="".join(f"{json.dumps(walk)}\n" for walk in WALKS),
        env=environment | {"LD_PRELOAD": str(library)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = (json.loads(line) for line in done.stdout.splitlines())
    return dict(zip(WALKS, found, strict=True))


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: "-".join(map(str, walk)))
def test_nothing_is_wrong_and_nothing_more_is_launched(
    walk: tuple[Any, ...], walked: dict[tuple[Any, ...], dict[str, Any]]
) -> None:
    assert walked[walk]["problems"] == []
    counted = Counter(f"{what} from {line}" for what, line in walked[walk]["launches"])
    assert counted.total() <= WALKS[walk], counted.most_common()


def test_maps_stay_in_half_precision(walked: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    scoring = walked["score", "zhanglab", "bf16", 16, "uint8"]["launches"]
    widened = [line for what, line in scoring if what == "torch.bfloat16 to torch.float32"]
    assert len(widened) == 1  # ahead of the in-painting, which chooses slots in float32
    assert widened[0].startswith("inference/network.py")


def test_convolutions_get_the_layout_that_they_compute_in(
    walked: dict[tuple[Any, ...], dict[str, Any]],
) -> None:
    for walk, found in walked.items():
        copied = [line for what, line in found["launches"] if what.startswith("copy for")]
        # For the in-painting's last one, behind vectors of patches: twice forward, once backward.
        assert len(copied) <= (3 if walk[0] == "train" else 1), (walk, copied)
