"""What screening costs: the arithmetic, by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import main
from bench.scoring import costs, decoding
from squid_fast.data import read_image

# One core decodes 100 files/s of 1 MB; two cores score 10 images/s: 0.01 + 0.2 core-seconds each.
RATES = costs.Rates({"big": costs.Format(1e6, 0.01)}, 2, 10.0, None, "this", "that")
# 50 MB/s are 50 images/s, 0.8 Gbit/s are 100, 8 Gbit/s of the storage are 1000.
ASSUMED = costs.Assumptions(
    disk_mb=50, network_gbit=0.8, store_gbit=8, gpu_cores=4, cluster_cores=42, machines=3,
    core_hour=0.1, terabyte_month=20,
)  # fmt: skip


def cells(table: str, row: int = 0) -> list[str]:
    return table.splitlines()[2 + row].strip("| ").split(" | ")


def test_ceilings_are_those_of_cores_disk_and_network() -> None:
    for cores, scoring, rate in ((42, True, 200), (4, False, 400)):
        found = costs.ceilings(RATES, RATES.formats["big"], cores, scoring, ASSUMED)
        assert found == pytest.approx({"cores": rate, "disk": 50, "network": 100})
    packed = costs.Format(1e4, 0.0)
    assert costs.ceilings(RATES, packed, 4, False, ASSUMED)["cores"] == float("inf")
    assert costs.first_limit({"a": 3.0, "b": 2.0, "c": float("inf")}) == ("b", 2.0)


def test_tables_by_hand() -> None:
    # 2 / 0.21 = 9.52 images/s; 10^6 of them take 105,000 s on two cores.
    laptop = cells(costs.laptop(RATES, ASSUMED))
    assert laptop == ["big", "9.5", "cores", "29.2 h", "121.5 days", "3.3 years", "58"]
    # 10^6 files are 1 TB; 10^9 take 10^7 s at 100 MB/s.
    storage = cells(costs.storage(RATES, ASSUMED))
    assert storage == ["big", "1 TB", "100 TB", "1 PB", "115.7 days", "20,000 USD"]
    gpu = costs.one_gpu(RATES, ASSUMED)
    assert cells(gpu)[:5] == ["big", "400", "50", "100", "disk"]
    assert "No scorer has been measured on a GPU yet" in gpu
    gpu = costs.one_gpu(dataclasses.replace(RATES, gpu=20.0), ASSUMED)  # one more limit
    assert cells(gpu)[4:6] == ["GPU", "13.9 h"]
    assert "scores 20 images/s, measured" in gpu
    # 200 images/s by the cores of one machine, 100 by its network: 300 of three machines.
    together = cells(costs.cluster(RATES, ASSUMED))
    assert together[:5] == ["big", "300", "network", "10", "55.6 min"]
    assert together[-2:] == ["117", "11.67 USD"]
    more = dataclasses.replace(ASSUMED, machines=30)
    assert cells(costs.cluster(RATES, more))[:3] == ["big", "1,000", "storage"]


def test_rates_come_from_the_results(tmp_path: Path) -> None:
    files = {"JPEG": {"bytes": 1000, "files_per_second": 50.0}}
    found = {"device": "that", "side": 8, "files": files}
    (tmp_path / "decoding_cpu.json").write_text(json.dumps(found))
    contenders = {"published way": 90.0, "squid_fast, 1": 3.0, "squid_fast, 16": 7.0}
    rows = {name: {"images_per_second": speed} for name, speed in contenders.items()}
    other = {"device": "other", "threads": 1, "rows": {}}
    speed = {"evaluation": {"device": "this", "threads": 2, "rows": rows}, "training": other}
    (tmp_path / "speed_cpu.json").write_text(json.dumps(speed))
    formats = {"JPEG": costs.Format(1000, 0.02), "packed 8 × 8": costs.Format(64, 0.0)}
    assert costs.read_rates(tmp_path) == costs.Rates(formats, 2, 7.0, None, "this", "that")
    (tmp_path / "speed_cuda.json").write_text(json.dumps(speed))
    assert costs.read_rates(tmp_path).gpu == 7.0


def test_options_replace_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    main(["costs", "--disk-mb", "123", "--machines", "7"])
    printed = capsys.readouterr().out
    assert "| disk of one machine | 123 MB/s | assumed |" in printed
    assert "7 machines of 64 cores" in printed


def test_decoding_is_measured_on_files_of_the_sizes_named(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("pydicom")
    source = tmp_path / "images" / "small.jpeg"
    source.parent.mkdir()
    image.fromarray(np.zeros((8, 8), np.uint8)).save(source)
    large = decoding.large_files(source, tmp_path)
    assert [read_image(path).shape for path in large] == [(2048, 2048)] * 2
    rows = decoding.measure(source.parent, rounds=1).values()
    assert [row["bytes"] for row in rows] == [path.stat().st_size for path in (source, *large)]


def test_the_page_has_every_table_once() -> None:
    page = (costs.RESULTS / "scale.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- figures: (\w+) -->", page)) == sorted(costs.TABLES)
