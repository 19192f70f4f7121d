"""The GPU session's dry run: the whole script on the CPU, under Triton's interpreter."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POINTS = {
    "parity": {"error_torch", "error_torch_own_streams", "error_triton"},
    "vit": {"forward_compiled", "forward_backward_compiled", "relprop_triton_chefer_graph", "relprop_torch_chefer"},
    "latency": {"relprop_triton_graph"},
    "tokens": {"forward", "relprop_triton_chefer"},
    "llama": {"forward_compiled"},
    "several": {"forward_compiled", "relprop_triton_chefer"},
}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        ["bash", "benchmarks/gpu_session.sh", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "SLOWER": "20"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    checks, kernels = rows_of(tmp_path / "checks.csv"), rows_of(tmp_path / "kernels.csv")
    assert all(row["right"] == "True" for row in checks)
    assert {row["op"] for row in checks} == {row["op"] for row in kernels}
    assert len({row["op"] for row in checks}) == 12
    assert {row["ceiling"] for row in rows_of(tmp_path / "ceilings.csv")} == {
        "copy_gb_s",
        "bf16_tflop_s",
        "tf32_tflop_s",
        "fp32_tflop_s",
    }
    for point, expected in POINTS.items():
        rows = rows_of(tmp_path / f"end_to_end_{point}.csv")
        assert expected <= {row["run"] for row in rows}
        assert not [row["failed"] for row in rows if row.get("failed")]
    assert all(row["dry_run"] == "True" for row in kernels)
    assert all(float(row["ms_median"]) > 0 for row in rows_of(tmp_path / "peers.csv") if not row["error"])


def test_limits_add_up_to_ten_minutes() -> None:
    script = (ROOT / "benchmarks" / "gpu_session.sh").read_text()
    assert sum(int(seconds) for seconds in re.findall(r"^ *run \w+ (\d+) ", script, re.M)) <= 600
