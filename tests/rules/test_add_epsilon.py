from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import EXACT, REFERENCE, AddEpsilon, AddIdentity, Stabiliser
from tests.rules.add_checks import CASES, add_op, handed_out, operands, settled
from tests.rules.rule_checks import SIZES, Parts, assert_near, check_gradient, check_ledger, check_rule, divide

RULES = {
    "default": AddEpsilon(),
    "coarse": AddEpsilon(Stabiliser(0.1)),
    "exact": AddEpsilon(EXACT),
    "reference": AddEpsilon(REFERENCE),
}


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, rule: AddEpsilon, batch: int, targets: int) -> None:
    def oracle(relevance: Tensor, *inputs: Tensor) -> Parts:
        a, b = CASES[name].summands(*inputs)
        s = divide(relevance, a + b, rule.stabiliser)
        return handed_out(name, (a * s, b * s), inputs)

    op, inputs = add_op(name), operands(name, batch)
    check_rule(op, rule, inputs, op.relevance(inputs, targets), oracle, settled(name))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_ledger(name: str, rule: AddEpsilon) -> None:
    op, inputs = add_op(name), operands(name, 4)
    relevance = op.relevance(inputs, 3)
    constant = CASES[name].carrying == 1
    entry = check_ledger(op, rule, inputs, relevance, ["epsilon", "constant"] if constant else ["epsilon"])
    if constant:
        a, b = CASES[name].summands(*inputs)
        part = (a if name == "bias" else b) * divide(relevance, a + b, rule.stabiliser)
        assert_near(entry.absorbed["constant"], part.flatten(2).sum(-1), 1e-10)


@pytest.mark.parametrize("name", ["difference", "broadcast-both", "scaled-difference", "positional"])
def test_gradient(name: str) -> None:
    op, inputs = add_op(name), operands(name, 2, zeros=False)
    check_gradient(op, AddEpsilon(Stabiliser(0.1)), inputs, op.relevance(inputs, 2))


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("name", CASES)
def test_identity(name: str, batch: int, targets: int) -> None:
    def oracle(relevance: Tensor, *inputs: Tensor) -> Parts:
        part = relevance / len(inputs)
        return handed_out(name, (part, part), inputs)

    op, inputs = add_op(name), operands(name, batch)
    check_rule(op, AddIdentity(), inputs, op.relevance(inputs, targets), oracle)


@pytest.mark.parametrize("name", CASES)
def test_identity_ledger(name: str) -> None:
    op, inputs = add_op(name), operands(name, 4)
    entry = check_ledger(op, AddIdentity(), inputs, op.relevance(inputs, 3), [])
    torch.testing.assert_close(entry.passed, entry.arriving, rtol=1e-12, atol=1e-12)
