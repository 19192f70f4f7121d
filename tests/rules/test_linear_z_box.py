from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import REFERENCE, LinearZBox, Stabiliser
from tests.rules.linear_checks import CASES, Dense, check_linear_rule, linear_op
from tests.rules.rule_checks import SIZES, check_gradient, check_ledger, divide, random

RULES = {
    "own-bounds": LinearZBox(stabiliser=REFERENCE),
    "signed": LinearZBox(stabiliser=Stabiliser(1e-3)),
    "given-bounds": LinearZBox(-5.0, 5.0),
    "given-low": LinearZBox(low=-6.0),
}


def boxed(rule: LinearZBox, layer: Dense) -> Tensor:
    """x w - low w+ - high w- for every pair. [B, N, K]"""
    low = layer.x.amin(1) if rule.low is None else torch.full((len(layer.x),), rule.low, dtype=torch.float64)
    high = layer.x.amax(1) if rule.high is None else torch.full((len(layer.x),), rule.high, dtype=torch.float64)
    to_low, to_high = (layer.x - low[:, None])[:, None, :], (layer.x - high[:, None])[:, None, :]
    return torch.where(layer.matrix > 0, to_low, to_high) * layer.matrix


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", [name for name in CASES])
def test_formula(name: str, rule: LinearZBox, batch: int, targets: int) -> None:
    def formula(layer: Dense, relevance: Tensor) -> Tensor:
        z = boxed(rule, layer)
        return torch.einsum("bnk,tbn->tbk", z, divide(relevance, z.sum(-1), rule.stabiliser))

    check_linear_rule(name, rule, formula, batch, targets)


def test_contributions_are_not_negative() -> None:
    op, x = linear_op("conv2d-patches"), random(4, 3, 9, 8, seed=3)
    relevance = op.relevance([x], 3).abs()
    back = LinearZBox().propagate(op.call([x]), relevance)[0]
    assert back is not None
    assert bool((back >= -1e-12).all())


@pytest.mark.parametrize("name", ["linear", "conv2d-patches", "conv2d-groups"])
def test_ledger(name: str) -> None:
    op, x = linear_op(name), random(4, *CASES[name].shape, seed=3, zeros=True)
    check_ledger(op, RULES["own-bounds"], [x], op.relevance([x], 3), ["epsilon"])
    check_ledger(op, RULES["given-bounds"], [x], op.relevance([x], 3), ["epsilon"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [RULES["own-bounds"], LinearZBox()], ids=["reference", "signed"])
@pytest.mark.parametrize("level", [0.0, 0.7])
def test_blank_image_gets_nothing(level: float, rule: LinearZBox, dtype: torch.dtype) -> None:
    """All contributions are exactly 0; a denominator of rounding noise must not make something of them."""
    op, x = linear_op("conv2d-patches"), torch.full((2, 3, 9, 8), level, dtype=dtype)
    back = rule.propagate(op.call([x], dtype), op.relevance([x], 3).to(dtype))[0]
    assert back is not None
    assert not back.any()


def test_gradient() -> None:
    op, x = linear_op("conv1d"), random(2, 3, 7, seed=1)
    weights = {"weight": random(5, 3, 3, seed=2), "bias": random(5, seed=3)}
    check_gradient(op, LinearZBox(-4.0, 4.0), [x], op.relevance([x], 2), weights)
