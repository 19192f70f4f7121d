from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import MulHalf, MulPositional
from tests.rules.rule_checks import SIZES, Op, Parts, check_ledger, check_rule, module_of, random

TABLE = random(4, 6, seed=5)


def rotary_op() -> Op:
    return Op(module_of(lambda a, table: a * table, 1, table=TABLE.clone()), random(2, 3, 4, 6), kind="mul")


@pytest.mark.parametrize(("batch", "targets"), SIZES)
def test_formula(batch: int, targets: int) -> None:
    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        return relevance / 2, None

    op, inputs = rotary_op(), [random(batch, 3, 4, 6, zeros=True)]
    check_rule(op, MulPositional(), inputs, op.relevance(inputs, targets), oracle)


def test_what_positions_keep() -> None:
    """Per token, summed over heads and channels."""
    op, inputs = rotary_op(), [random(3, 3, 4, 6)]
    relevance, call = op.relevance(inputs, 2), op.call(inputs)
    call.positions = []
    MulPositional().propagate(call, relevance)
    torch.testing.assert_close(call.positions, [relevance.sum((2, 4)) / 2])
    entry = check_ledger(op, MulPositional(), inputs, relevance, ["position"])
    torch.testing.assert_close(entry.absorbed["position"], entry.arriving / 2)


def test_two_activations_get_half_each() -> None:
    op = Op(module_of(torch.mul, 2), random(2, 3), random(2, 3), kind="mul")
    inputs = [random(2, 3, seed=1), random(2, 3, seed=2)]
    relevance = op.relevance(inputs, 2)
    found = MulPositional().propagate(op.call(inputs), relevance)
    torch.testing.assert_close(found, MulHalf().propagate(op.call(inputs), relevance))
