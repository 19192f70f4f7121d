from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import EXACT, REFERENCE, LinearEpsilon, Stabiliser
from tests.rules.linear_checks import CASES, Dense, check_linear_rule, dense, linear_op
from tests.rules.rule_checks import SIZES, assert_near, check_gradient, check_ledger, divide, random

RULES = {
    "default": LinearEpsilon(),
    "no-bias": LinearEpsilon(bias=False),
    "coarse": LinearEpsilon(Stabiliser(0.1)),
    "exact": LinearEpsilon(EXACT),
    "reference": LinearEpsilon(REFERENCE),
}


def shares(rule: LinearEpsilon, layer: Dense, relevance: Tensor) -> Tensor:
    """R / stab(z). [T, B, N]"""
    return divide(relevance, layer.y if rule.bias else layer.z, rule.stabiliser)


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, rule: LinearEpsilon, batch: int, targets: int) -> None:
    def formula(layer: Dense, relevance: Tensor) -> Tensor:
        return torch.einsum("bnk,tbn->tbk", layer.contributions, shares(rule, layer, relevance))

    check_linear_rule(name, rule, formula, batch, targets)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_ledger(name: str, rule: LinearEpsilon) -> None:
    op, x = linear_op(name), random(4, *CASES[name].shape, seed=3, zeros=True)
    relevance = op.relevance([x], 3)
    layer = dense(op, x)
    takes = rule.bias and layer.bias is not None
    entry = check_ledger(op, rule, [x], relevance, ["epsilon", "bias"] if takes else ["epsilon"])
    s = shares(rule, layer, relevance.flatten(2))
    z = layer.y if rule.bias else layer.z
    leak = (relevance.flatten(2) - s * z).sum(-1)
    torch.testing.assert_close(entry.absorbed["epsilon"], leak, rtol=1e-6, atol=1e-12)  # differences: rounding is left
    if takes:
        assert_near(entry.absorbed["bias"], (s * layer.bias).sum(-1), 1e-10)


def test_zero_input_keeps_everything() -> None:
    op, x = linear_op("linear-no-bias"), torch.zeros(2, 7, dtype=torch.float64)
    relevance = op.relevance([x], 3)
    entry = check_ledger(op, LinearEpsilon(), [x], relevance, ["epsilon"])
    assert_near(entry.absorbed["epsilon"], relevance.sum(-1), 1e-12)
    assert not entry.passed.any()


@pytest.mark.parametrize("name", ["linear-one", "conv1d"])
def test_gradient(name: str) -> None:
    op, x = linear_op(name), random(2, *CASES[name].shape, seed=1)
    check_gradient(op, LinearEpsilon(Stabiliser(0.1)), [x], op.relevance([x], 2))
