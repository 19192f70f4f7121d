"""precision="medium": bfloat16 products where the hardware has them, no global flag touched."""

from __future__ import annotations

import copy

import pytest
import torch

import relprop
from relprop.rules import linear_map
from tests.engine.models import relative, vit


def _flags() -> tuple[object, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("composite", ["chefer", "chefer_stable"])
def test_medium_with_bfloat16_products(composite: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with bfloat16 instructions; torch emulates the products elsewhere."""
    monkeypatch.setattr(linear_map, "native_bfloat16", lambda: True)
    model, x = vit(), torch.randn(4, 3, 32, 32)
    truth = relprop.explain(copy.deepcopy(model).double(), x.double(), target=1, composite=composite).relevance
    before = _flags()
    engine = relprop.compile(model, (x,), precision="medium", composite=composite, backend=backend)
    found = engine(x, target=1).relevance
    assert _flags() == before
    assert found.dtype == torch.float32
    high = relprop.explain(model, x, target=1, composite=composite, backend=backend).relevance
    errors = [relative(found[i, 1:], truth[i, 1:]) for i in range(4)]
    # bfloat16 rounds to 2^-9: visible, and small on typical samples.
    assert 1e-4 < sorted(errors)[1] < 0.1
    assert relative(high, truth) < relative(found, truth)


def test_medium_without_bfloat16_instructions_is_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_map, "native_bfloat16", lambda: False)
    model, x = vit(), torch.randn(2, 3, 32, 32)
    medium = relprop.explain(model, x, target=1, precision="medium").relevance
    assert torch.equal(medium, relprop.explain(model, x, target=1).relevance)
