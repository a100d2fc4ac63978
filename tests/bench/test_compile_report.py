"""The compile report in processes of its own: here Triton may be set to interpret."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich")

import triton

from bench.machine_code import report
from bench.machine_code.report import file_name, problems

ROOT = Path(__file__).parents[2]

GOOD = {
    "arch": "sm_90",
    "spilled_bytes": 0,
    "spill_instructions": 0,
    "shared_bytes": 227 * 1024,
    "dots": ["64x64x256 bf16"],
    "dots_without_matrix_unit": 0,
    "unwaited_products": 0,
    "matrix_instructions": {"HGMMA": 18},
}

BAD_KERNELS = """
import triton
import triton.language as tl


@triton.jit
def product(a_ptr, b_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    a = tl.load(a_ptr + rows * C + columns)
    b = tl.load(b_ptr + tl.arange(0, C)[:, None] * C + columns)
    tl.store(out_ptr + rows * C + columns, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def products(a_ptr, b_ptr, out_ptr, steps, N: tl.constexpr, WAIT: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros([N, N], tl.float32)
    for step in range(steps):
        b = tl.load(b_ptr + (step * N + rows) * N + columns)
        a = tl.load(a_ptr + (step * N + rows) * N + columns)
        low = (a - a.to(b.dtype).to(tl.float32)).to(b.dtype)  # worked out in registers
        product = tl.dot(low, b, tl.zeros_like(total) if WAIT else total)
        product = tl.dot(a.to(b.dtype), b, product)
        total = total + product if WAIT else product
    tl.store(out_ptr + rows * N + columns, total)


@triton.jit
def hoard(x_ptr, out_ptr, steps, N: tl.constexpr):
    places = tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for step in range(steps):
        total += tl.load(x_ptr + step * N + places)
    tl.store(out_ptr + places, total)
"""

MEASURE = """
import json, sys, torch, bad
from bench.machine_code.report import problems
from bench.machine_code.compilers import CARDS, measure, recorded

def compiled(arch, launch):
    with recorded(CARDS[arch]) as launches:
        launch()
    assert len(launches) == 1
    row = measure(launches[0])
    return {**row, "problems": problems(row)}

def product(rows, columns, dtype, precision, warps=4):
    x = torch.empty(rows * columns + columns**2, dtype=dtype, device="meta")
    bad.product[(1,)](x, x, x, rows, columns, precision, num_warps=warps)

def hoard():
    x = torch.empty(16384, device="meta")
    bad.hoard[(1,)](x, x, 8, 8192, num_warps=1)  # 256 numbers to a thread

def products(wait):
    x = torch.empty(8 * 64**2, device="meta")
    bad.products[(1,)](x, x.bfloat16(), x, 8, 64, wait)

print(json.dumps({
    "warpgroup": compiled("sm_90", lambda: product(64, 64, torch.bfloat16, "tf32")),
    "too few warps": compiled("sm_90", lambda: product(64, 64, torch.bfloat16, "tf32", warps=2)),
    "older card": compiled("sm_80", lambda: product(64, 64, torch.bfloat16, "tf32")),
    "no matrix unit": compiled("sm_80", lambda: product(16, 16, torch.float32, "ieee")),
    "amd": compiled("gfx942", lambda: product(32, 32, torch.float32, "ieee")),
    "spills": compiled("sm_80", lambda: hoard()),
    "unwaited": compiled("sm_90", lambda: products(False)),
    "waited": compiled("sm_90", lambda: products(True)),
}))
"""


def run(*command: str, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    inherited["PYTHONPATH"] = os.pathsep.join([str(path), str(ROOT)])
    how = {"cwd": ROOT, "env": inherited | environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *command], timeout=300, **how)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spilled_bytes": 8, "spill_instructions": 4}, "spills 8 bytes"),
        ({"spill_instructions": 4}, "4 loads and stores"),
        ({"shared_bytes": 227 * 1024 + 1}, "may use 232448"),
        ({"matrix_instructions": {}}, "no matrix instruction at all"),
        ({"matrix_instructions": {"HMMA": 18}}, "without HGMMA; it has HMMA"),
        ({"matrix_instructions": {"HMMA": 1, "HGMMA": 18}}, "has 1 HMMA"),
        ({"dots_without_matrix_unit": 1}, "1 of its dots outside"),
        ({"unwaited_products": 1}, "still being multiplied, in 1 loops"),
        ({"arch": "gfx942", "shared_bytes": 0}, "without MFMA"),
        ({"arch": "sm_80", "shared_bytes": 0}, "without HMMA"),
        ({"error": "CompilationError: why."}, "does not compile: CompilationError: why."),
    ],
)
def test_what_is_bad_is_said(change: dict[str, Any], says: str) -> None:
    assert any(says in problem for problem in problems(GOOD | change))


def test_what_is_good_is_not_complained_about() -> None:
    for change in (
        {},
        {"dots": [], "matrix_instructions": {}},
        {"dots": ["16x64x256 bf16"], "matrix_instructions": {"HMMA": 2}},
        {"dots": ["16x64x8 bf16", "64x64x8 bf16"], "matrix_instructions": {"HMMA": 2, "HGMMA": 1}},
        {"arch": "sm_80", "shared_bytes": 163 * 1024, "matrix_instructions": {"HMMA": 2}},
        {"arch": "gfx942", "shared_bytes": 64 * 1024, "matrix_instructions": {"MFMA": 2}},
    ):
        assert problems(GOOD | change) == [], change


def test_bad_kernels_are_found_in_their_machine_code(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD_KERNELS)
    done = run("-c", MEASURE, path=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)

    for name, unit in {"warpgroup": "HGMMA", "older card": "HMMA", "amd": "MFMA"}.items():
        assert rows[name]["problems"] == []
        assert set(rows[name]["matrix_instructions"]) == {unit}
    assert rows["warpgroup"]["dots"] == ["64x64x64 bf16"]
    assert rows["warpgroup"]["matrix_instructions"]["HGMMA"] == 4  # 64 deep, 16 at a time

    assert "without HGMMA; it has HMMA" in rows["too few warps"]["problems"][0]
    (problem,) = rows["no matrix unit"]["problems"]
    assert "no matrix instruction at all" in problem
    spills = rows["spills"]
    assert spills["registers"] == 255
    assert (spills["spilled_bytes"] > 100, spills["spill_instructions"] > 10) == (True, True)
    assert "spills" in spills["problems"][0]
    (problem,) = rows["unwaited"]["problems"]
    assert "still being multiplied" in problem
    assert rows["waited"]["problems"] == []


def test_the_report_of_one_kernel(tmp_path: Path) -> None:
    options = ["--arch", "sm_90", "--only", "masked_shortcut_forward", "--output", str(tmp_path)]
    done = run("-m", "bench", "machine-code", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sm_90" in done.stdout
    assert "0 problems" in done.stdout
    (path,) = tmp_path.iterdir()
    assert path.name == file_name(triton.__version__)
    rows = json.loads(path.read_text())["configurations"]
    assert {row["dtypes"][0] for row in rows} == {"fp32", "bf16", "fp16"}
    for row in rows:
        assert row["kernel"] == "_masked_shortcut_forward_kernel"
        assert row["arguments"]["inpainted_ptr"].endswith(":16")
        assert 16 <= row["registers"] <= 255
        assert 500 < row["code_bytes"] < 100_000
        assert row["spilled_bytes"] == row["shared_bytes"] // 2**16 == 0
        assert row["dots"] == row["problems"] == []
        assert row["calls"] >= 1


@pytest.mark.parametrize(
    ("options", "environment", "says"),
    [
        (["--only", "no such kernel"], {}, "no such kernel"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ],
)
def test_nothing_compiled_is_no_success(
    options: list[str], environment: dict[str, str], says: str
) -> None:
    done = run("-m", "bench", "machine-code", *options, **environment)
    assert done.returncode == 1
    assert says in done.stdout + done.stderr


def test_of_sizes_the_unaligned_are_hardest_and_one_is_easy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def described(steps: str) -> dict[str, Any]:
        arguments = {"x_ptr": "*bf16:16", "steps": steps}
        return {"constants": {"BLOCK_S": 32}, "arguments": arguments}

    monkeypatch.setattr(report, "describe", described)
    chosen = report.hardest({"1": ["small"], "i32": ["odd"], "i32:16": ["even"]})  # type: ignore[dict-item]
    assert chosen == {"i32": ["odd", "small", "even"]}


def test_each_triton_has_a_report_of_its_own() -> None:
    assert file_name("3.7.1") == "compile_report.json"  # that of constraints.txt
    assert file_name("3.7") == "compile_report_3.7.json"
    assert file_name("3.6.0") == "compile_report_3.6.0.json"


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_the_committed_report_has_every_kernel_for_every_card(version: str) -> None:
    report = json.loads((ROOT / "bench" / "results" / file_name(version)).read_text())
    rows = report["configurations"]
    assert report["triton"] == version
    assert not any(row["problems"] for row in rows)
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    named = set(re.findall(r"^def (_\w*_kernel)\(", sources, re.MULTILINE))
    for arch in ("sm_80", "sm_90", "gfx942"):
        assert {row["kernel"] for row in rows if row["arch"] == arch} == named
