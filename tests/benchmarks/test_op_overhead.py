"""Rows of benchmarks/op_overhead.py: what a block costs at each call of a shape."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

from benchmarks.op_overhead import blocks, new_engines


def test_the_first_calls_and_pythons_share_have_rows() -> None:
    with torch.no_grad():
        rows = blocks(1, 1, 2) + new_engines(1, 1, 2)
    times = {row["call"]: row["us_median"] for row in rows}
    assert {"engine - calls", "plan - calls", "first call", "second call"} <= set(times)
    assert times["plan - calls"] == pytest.approx(times["plan"] - times["calls"], abs=0.02)
