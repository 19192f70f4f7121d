from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import LinearEpsilon, LinearGamma, Stabiliser
from tests.rules.linear_checks import CASES, Dense, check_linear_rule, dense, linear_op
from tests.rules.rule_checks import SIZES, assert_near, away_from_zero, check_gradient, check_ledger, divide, random

RULES = {
    "default": LinearGamma(),
    "strong": LinearGamma(10.0, Stabiliser(0.1)),
    "no-bias-share": LinearGamma(1.0, bias=False),
}


def weighted(rule: LinearGamma, layer: Dense) -> tuple[Tensor, Tensor | None]:
    """Contributions, and the bias's, with those of the output's sign 1 + gamma times as large."""
    sign = torch.sign(layer.y)
    z = torch.where(layer.contributions * sign[..., None] > 0, 1 + rule.gamma, 1.0) * layer.contributions
    if layer.bias is None or not rule.bias:
        return z, None
    return z, torch.where(layer.bias * sign > 0, 1 + rule.gamma, 1.0) * layer.bias


def shares(rule: LinearGamma, layer: Dense, relevance: Tensor) -> Tensor:
    z, bias = weighted(rule, layer)
    total = z.sum(-1) if bias is None else z.sum(-1) + bias
    return torch.where(layer.y == 0, 0.0, divide(relevance, total, rule.stabiliser))


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, rule: LinearGamma, batch: int, targets: int) -> None:
    def formula(layer: Dense, relevance: Tensor) -> Tensor:
        return torch.einsum("bnk,tbn->tbk", weighted(rule, layer)[0], shares(rule, layer, relevance))

    check_linear_rule(name, rule, formula, batch, targets)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_ledger(name: str, rule: LinearGamma) -> None:
    op, x = linear_op(name), random(4, *CASES[name].shape, seed=3, zeros=True)
    relevance = op.relevance([x], 3)
    layer = dense(op, x)
    bias = weighted(rule, layer)[1]
    entry = check_ledger(op, rule, [x], relevance, ["epsilon"] if bias is None else ["epsilon", "bias"])
    if bias is not None:
        assert_near(entry.absorbed["bias"], (shares(rule, layer, relevance.flatten(2)) * bias).sum(-1), 1e-10)


def test_gamma_zero_is_epsilon() -> None:
    op, x = linear_op("linear"), random(4, 5, 63, seed=3)
    relevance = op.relevance([x], 3)
    got, want = (r.propagate(op.call([x]), relevance)[0] for r in (LinearGamma(0.0), LinearEpsilon()))
    assert got is not None and want is not None
    assert_near(got, want, 1e-12)


def test_gradient() -> None:
    op, x = linear_op("conv1d"), away_from_zero(random(2, 3, 7, seed=1))
    weights = {"weight": away_from_zero(random(5, 3, 3, seed=2)), "bias": away_from_zero(random(5, seed=3))}
    check_gradient(op, LinearGamma(stabiliser=Stabiliser(0.1)), [x], op.relevance([x], 2), weights)
