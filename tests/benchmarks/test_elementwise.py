"""Rows of benchmarks/rules/bench_elementwise.py: every kernel that memory bounds has some."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.rules import bench_elementwise
from relprop import native
from relprop.ops.registry import SPECS, WHOLE_LAYERS

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])


@pytest.mark.parametrize("saved", bench_elementwise.DTYPES)
def test_every_op_but_products_has_a_case_and_is_right(saved: torch.dtype) -> None:
    torch.manual_seed(0)
    cases = bench_elementwise.cases(saved, batch=2, tokens=5, channels=24, heads=3)
    assert {op for op, _ in cases} == set(SPECS) - WHOLE_LAYERS
    for (op, variant), arguments in cases.items():
        assert bench_elementwise.error(op, arguments) < 1e-4, (op, variant)
        assert {t.dtype for t in bench_elementwise.tensors(arguments)} <= {torch.float32, saved}


def test_a_row_has_bytes_and_its_share_of_a_copy() -> None:
    x, r = torch.rand(2, 8), torch.rand(1, 2, 8)
    (row,) = bench_elementwise.measure("linear_epsilon_select", "", torch.float32, (x, r), [1], rounds=3)
    assert row["mbytes"] * 1e6 == 3 * 4 * 16
    assert row["gb_per_s"] > 0 and row["share_of_copy"] > 0


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_elementwise, "error", lambda *_: 1.0)
    with pytest.raises(SystemExit, match="expected an error below 1e-4, got 1; nothing is timed"):
        bench_elementwise.measure("linear_epsilon_select", "", torch.float32, (torch.rand(2), torch.rand(1, 2)), [1], 3)


def test_rows_are_shown() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert "```{rows} elementwise_cpu.csv\n" in page
