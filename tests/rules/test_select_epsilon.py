from __future__ import annotations

import functools

import pytest
from torch import Tensor

from relprop.rules import EXACT, REFERENCE, SelectEpsilon, Stabiliser
from tests.rules.rule_checks import (
    SIZES,
    Op,
    Parts,
    assert_near,
    check_gradient,
    check_ledger,
    check_rule,
    divide,
    module_of,
    random,
)

RULES = {
    "default": SelectEpsilon(),
    "reference": SelectEpsilon(REFERENCE),
    "coarse": SelectEpsilon(Stabiliser(0.1)),
}


@functools.cache
def select_op() -> Op:
    """Row 0 of seven; the slice before it has cut off the others."""
    return Op(module_of(lambda x: x[:, 0]), random(2, 7, 63), kind="select")


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_formula(rule: SelectEpsilon, batch: int, targets: int) -> None:
    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        row = x[:, 0]
        back = relevance if rule.stabiliser == EXACT else row * divide(relevance, row, rule.stabiliser)
        return (back[:, :, None],)

    op, x = select_op(), random(batch, 7, 63, zeros=True)
    check_rule(op, rule, [x], op.relevance([x], targets), oracle)


def test_ledger() -> None:
    op, x = select_op(), random(4, 7, 63, zeros=True)
    relevance = op.relevance([x], 3)
    exact = check_ledger(op, SelectEpsilon(), [x], relevance, [])
    assert_near(exact.passed, exact.arriving, 1e-12)
    entry = check_ledger(op, RULES["reference"], [x], relevance, ["epsilon"])
    assert_near(entry.absorbed["epsilon"], (relevance * (x[:, 0] == 0)).sum(-1), 1e-6)


def test_gradient() -> None:
    op, x = Op(module_of(lambda x: x[:, 1]), random(2, 3, 5), kind="select"), random(2, 3, 5)
    check_gradient(op, RULES["coarse"], [x], op.relevance([x], 2))
