"""The GPU session times the library's products beside our own kernels, once they are held to float64."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
OPS = {
    ("linear_alpha_beta_share_out", ""),
    ("linear_epsilon_share_out", ""),
    ("linear_alpha_beta_back", ""),
    ("linear_alpha_beta_back", "fused"),
    ("linear_epsilon_back", ""),
    ("linear_gamma_back", ""),
    ("linear_back", ""),
}


def test_the_librarys_products_are_checked_and_timed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.kernels", "--dry-run", "--backend", "library", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for table, dtypes in (("checks", {"bf16", "fp16", "highest", "high", "medium"}), ("kernels", {"bf16", "highest"})):
        with (tmp_path / f"{table}.csv").open() as file:
            rows = list(csv.DictReader(file))
        found = {(row["op"], row["variant"], row["dtype"]) for row in rows}
        assert found >= {(op, variant, dtype) for op, variant in OPS for dtype in dtypes}
        assert {row["backend"] for row in rows} == {"library"}
