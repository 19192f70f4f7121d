from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import EXACT, AddEpsilon, AddPositional, Stabiliser
from tests.rules.rule_checks import SIZES, Op, Parts, check_ledger, check_rule, divide, module_of, random

POSITION = random(1, 4, 7, seed=5)
RULES = [AddPositional(EXACT), AddPositional(Stabiliser(0.1))]


def positional_op() -> Op:
    return Op(module_of(lambda a, position: a + position, 1, position=POSITION.clone()), random(2, 4, 7), kind="add")


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES, ids=["exact", "coarse"])
def test_formula(rule: AddPositional, batch: int, targets: int) -> None:
    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        return x * divide(relevance, x + POSITION.to(x.dtype), rule.stabiliser), None

    op, inputs = positional_op(), [random(batch, 4, 7, zeros=True)]
    check_rule(op, rule, inputs, op.relevance(inputs, targets), oracle, lambda x: (x + POSITION).abs() > 0.05 * x.abs())


def test_what_positions_keep() -> None:
    op, inputs = positional_op(), [random(3, 4, 7)]
    relevance, call = op.relevance(inputs, 2), op.call(inputs)
    call.positions = []
    AddPositional(EXACT).propagate(call, relevance)
    kept = (POSITION * relevance / (inputs[0] + POSITION)).sum(-1)
    torch.testing.assert_close(call.positions, [kept])
    entry = check_ledger(op, AddPositional(EXACT), inputs, relevance, ["position", "epsilon"])
    torch.testing.assert_close(entry.absorbed["position"], kept.sum(-1))


def test_two_activations_share_as_by_epsilon() -> None:
    op = Op(module_of(torch.add, 2), random(2, 3), random(2, 3), kind="add")
    inputs = [random(2, 3, seed=1), random(2, 3, seed=2)]
    relevance = op.relevance(inputs, 2)
    found = AddPositional(EXACT).propagate(op.call(inputs), relevance)
    torch.testing.assert_close(found, AddEpsilon(EXACT).propagate(op.call(inputs), relevance))
