from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import EXACT, REFERENCE, LinearAlphaBeta, Stabiliser
from tests.rules.linear_checks import CASES, Dense, check_linear_rule, dense, linear_op
from tests.rules.rule_checks import SIZES, assert_near, away_from_zero, check_gradient, check_ledger, divide, random

RULES = {
    "z-plus": LinearAlphaBeta(),
    "z-plus-reference": LinearAlphaBeta(stabiliser=REFERENCE),
    "z-plus-exact": LinearAlphaBeta(stabiliser=EXACT),
    "z-plus-bias": LinearAlphaBeta(bias=True),
    "alpha2-beta1": LinearAlphaBeta(2.0, 1.0),
    "alpha2-beta1-bias": LinearAlphaBeta(2.0, 1.0, Stabiliser(1e-3), bias=True),
    "separate": LinearAlphaBeta(stabiliser=REFERENCE, joint=False),
    "separate-alpha2-beta1": LinearAlphaBeta(2.0, 1.0, joint=False),
}


def shared(rule: LinearAlphaBeta, part: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
    """Shares of one group of contributions [B, N, K] with one denominator. [T, B, K]"""
    z = part.sum(-1) if bias is None else part.sum(-1) + bias
    return torch.einsum("bnk,tbn->tbk", part, divide(relevance, z, rule.stabiliser))


def expected(rule: LinearAlphaBeta, layer: Dense, relevance: Tensor) -> Tensor:
    z, bias = layer.contributions, layer.bias if rule.bias else None
    if not rule.joint:
        # x+ w+ and x- w- (and for beta x+ w- and x- w+) with a denominator each.
        inputs, weights = (layer.x > 0)[:, None, :], layer.matrix > 0
        supporting = [
            shared(rule, torch.where(inputs == side, z.clamp(min=0), 0.0), None, relevance) for side in (True, False)
        ]
        opposing = [
            shared(rule, torch.where(weights == side, z.clamp(max=0), 0.0), None, relevance) for side in (True, False)
        ]
        return rule.alpha * sum(supporting) - rule.beta * sum(opposing)
    positive = shared(rule, z.clamp(min=0), None if bias is None else bias.clamp(min=0), relevance)
    negative = shared(rule, z.clamp(max=0), None if bias is None else bias.clamp(max=0), relevance)
    return rule.alpha * positive - rule.beta * negative


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, rule: LinearAlphaBeta, batch: int, targets: int) -> None:
    check_linear_rule(name, rule, lambda layer, relevance: expected(rule, layer, relevance), batch, targets)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_ledger(name: str, rule: LinearAlphaBeta) -> None:
    op, x = linear_op(name), random(4, *CASES[name].shape, seed=3, zeros=True)
    relevance = op.relevance([x], 3)
    layer = dense(op, x)
    causes = {"epsilon"} if rule.joint else set()
    if rule.bias and layer.bias is not None:
        causes.add("bias")
    if not rule.conserves:
        causes.add("rule")
    entry = check_ledger(op, rule, [x], relevance, sorted(causes))
    assert_near(entry.passed, expected(rule, layer, relevance.flatten(2)).sum(-1), 1e-10)


def test_z_plus_conserves_where_every_output_is_supported() -> None:
    op, x = linear_op("linear"), random(4, 5, 63, seed=3)
    relevance = op.relevance([x], 3)
    entry = check_ledger(op, LinearAlphaBeta(), [x], relevance, ["epsilon"])
    assert_near(entry.passed, relevance.sum((-1, -2)), 1e-8)  # epsilon 1e-9 against z+ of about 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unsupported_output_hands_on_nothing(dtype: torch.dtype) -> None:
    """Where no contribution is positive all relevance is absorbed, in the rule and in the books, to the last bit."""
    op = linear_op("linear-no-bias")
    weights = {"weight": -torch.rand(63, 7, dtype=torch.float64)}
    x = torch.rand(4, 7, dtype=torch.float64)
    for rule in (LinearAlphaBeta(), LinearAlphaBeta(stabiliser=REFERENCE), LinearAlphaBeta(stabiliser=EXACT)):
        (back, *_) = rule.propagate(op.call([x], dtype, weights=weights), random(3, 4, 63).to(dtype))
        assert back is not None
        assert not back.any()


@pytest.mark.parametrize("rule", [RULES["z-plus"], RULES["alpha2-beta1-bias"]], ids=["z-plus", "alpha2-beta1-bias"])
def test_gradient(rule: LinearAlphaBeta) -> None:
    op, x = linear_op("conv1d"), away_from_zero(random(2, 3, 7, seed=1))
    weights = {"weight": away_from_zero(random(5, 3, 3, seed=2)), "bias": away_from_zero(random(5, seed=3))}
    check_gradient(op, rule, [x], op.relevance([x], 2), weights)
