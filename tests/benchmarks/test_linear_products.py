"""benchmarks/rules/bench_linear_products.py times no wrong answer, shares included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.rules import bench_linear_products
from relprop import native

pytestmark = pytest.mark.skipif(
    not native.products_fast(torch.float32), reason="no matrix products of our own on this CPU"
)


def measured(operands: torch.dtype) -> list[dict[str, Any]]:
    return bench_linear_products.measure(14, 40, 64, operands=operands, rounds=1)


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16])
def test_right_answers_are_timed(operands: torch.dtype) -> None:
    if not native.products_fast(operands):
        pytest.skip(f"no products of {operands} on this CPU")
    torch.manual_seed(0)
    assert [row["product"] for row in measured(operands)[::2]] == ["apply", "share_out", "back", "transpose"]


@pytest.mark.parametrize("wrong", ["linear_apply", "share_out_product", "back_product", "linear_transpose"])
def test_wrong_answers_are_not(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    kernel = getattr(native, wrong)
    monkeypatch.setattr(native, wrong, lambda *given, **options: 1.01 * kernel(*given, **options))
    with pytest.raises(SystemExit, match="answers differ by 0.00990?[0-9]*; nothing is timed"):
        measured(torch.float32)


def test_a_cpu_without_such_products_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "products_fast", lambda _: False)
    monkeypatch.setattr("sys.argv", ["bench_linear_products"])
    with pytest.raises(SystemExit, match="expected a CPU with AVX-512, and RELPROP_ISA not below it, got "):
        bench_linear_products.main()
