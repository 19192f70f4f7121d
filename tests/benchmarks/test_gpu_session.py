"""The GPU session's dry run: the whole script on the CPU, under Triton's interpreter."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.machine import Machine

ROOT = Path(__file__).parents[2]
# What every point of the measurement has a row for.
POINTS = {
    "parity": {"error_torch", "error_torch_own_streams", "error_triton"},
    "vit": {
        "reference",
        "forward_compiled",
        "forward_backward_compiled",
        "relprop_triton_chefer_graph",
        "relprop_triton_chefer_stable",
        "relprop_torch_chefer",
    },
    "latency": {"relprop_triton_graph"},
    "tokens": {"forward", "relprop_triton_chefer", "reference"},
    "llama": {
        "forward_compiled",
        "forward_backward_compiled",
        "relprop_triton_attnlrp",
        "relprop_triton_attnlrp_graph",
        "lxt",
    },
    "several": {"forward_compiled", "relprop_triton_transformer_attribution", "relprop_triton_attnlrp"},
}
# Columns that hold what a point asks for.
COLUMNS = {
    "parity": {"error"},
    "vit": {"share_of_matrix_rate", "explanations_s", "over_forward", "over_reference"},
    "latency": {"ms", "ms_p99", "p99_over_p50"},
    "tokens": {"peak_mb"},
    "llama": {"over_forward", "over_relprop", "peak_mb"},
    "several": {"forwards_per_target"},
}
ELSEWHERE = {"reference", "lxt"}  # other people's code, which may not be at hand


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def session(out: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "benchmarks/gpu_session.sh", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable, "SLOWER": "20", **more},
        capture_output=True,
        text=True,
    )


def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = session(tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    checks, kernels = rows_of(tmp_path / "checks.csv"), rows_of(tmp_path / "kernels.csv")
    assert all(row["right"] == "True" for row in checks)
    assert {row["op"] for row in checks} == {row["op"] for row in kernels}
    assert len({row["op"] for row in checks}) == 15
    dtypes = {row["dtype"] for row in checks if row["op"].startswith("linear")}
    assert dtypes == {"bf16", "fp16", "highest", "high", "ieee"}
    assert {row["ceiling"] for row in rows_of(tmp_path / "ceilings.csv")} == {
        "copy_gb_s",
        "bf16_tflop_s",
        "tf32_tflop_s",
        "fp32_tflop_s",
    }
    for point, expected in POINTS.items():
        rows = rows_of(tmp_path / f"end_to_end_{point}.csv")
        assert expected <= {row["run"] for row in rows}
        assert COLUMNS[point] <= set(rows[0])
        assert not [row for row in rows if row.get("failed") and row["run"] not in ELSEWHERE]
    steps = rows_of(tmp_path / "steps.csv")
    assert {row["backend"] for row in steps} == {"torch", "triton"} and not [row for row in steps if row["failed"]]
    assert {("linear", "gradient + alpha_beta"), ("attention", "gradient + composed")} <= {
        (row["kind"], row["rules"]) for row in steps
    }
    assert {row["tool"] for row in rows_of(tmp_path / "sanitizer.csv")} == {"memcheck", "racecheck"}
    assert all(row["dry_run"] == "True" for row in kernels)
    assert all(float(row["ms_median"]) > 0 for row in rows_of(tmp_path / "peers.csv") if not row["error"])


def test_a_part_that_fails_hides_no_other(tmp_path: Path) -> None:
    """Every part fails, none hides the next, and what there is of them is packed."""
    done = session(tmp_path, PARTS="info ceilings", PACK="1", PYTHON="false")
    assert done.returncode == 1
    assert "== ceilings failed" in done.stderr and "== ceilings took" in done.stdout
    with tarfile.open(tmp_path / "session.tar.gz") as packed:
        assert {"./info.log", "./ceilings.log"} <= set(packed.getnames())


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    machine = Machine(dry=True, out=tmp_path)
    machine.begin("table")
    machine.add(run="first", ms=1.0)
    assert [row["run"] for row in rows_of(tmp_path / "table.csv")] == ["first"]
    machine.add(run="second", failed="no")
    machine.amend(more=2.0)
    rows = rows_of(tmp_path / "table.csv")
    assert [(row["run"], row["more"], row["failed"]) for row in rows] == [("first", "", ""), ("second", "2.0", "no")]


def test_a_kernel_that_fails_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not above: what imports the kernels first decides whether they run under the interpreter.
    from benchmarks.gpu import kernels
    from benchmarks.gpu.cases import Case

    def broken() -> object:
        raise RuntimeError("no such instruction")

    tensor = torch.ones(2)
    made = [
        Case("first", "bf16", "2", {"triton": broken}, lambda: (tensor,), 0.0, 8.0, 1e-3),
        Case("second", "bf16", "2", {"triton": lambda: (tensor,)}, lambda: (tensor,), 0.0, 8.0, 1e-3),
    ]
    monkeypatch.setattr(kernels, "cases", lambda machine, large: made)
    assert kernels.main(Machine(dry=True, out=tmp_path)) == 1
    checks, timed = rows_of(tmp_path / "checks.csv"), rows_of(tmp_path / "kernels.csv")
    assert [row["right"] for row in checks] == ["False", "True"]
    assert checks[0]["failed"] == "RuntimeError: no such instruction"
    assert timed[0]["failed"] == "its check did" and timed[1]["gb_s"]


def test_limits_add_up_to_ten_minutes() -> None:
    script = (ROOT / "benchmarks" / "gpu_session.sh").read_text()
    assert sum(int(seconds) for seconds in re.findall(r"^ *run \w+ (\d+) ", script, re.M)) <= 600
