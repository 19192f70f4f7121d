from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import EXACT, REFERENCE, MatmulAlphaBeta, Stabiliser
from tests.rules.rule_checks import (
    SIZES,
    Parts,
    away_from_zero,
    check_gradient,
    check_ledger,
    check_rule,
    divide,
    random,
)
from tests.rules.test_matmul_half import SHAPES, halves, matmul_op, operands, products

RULES = {
    "default": MatmulAlphaBeta(),
    "coarse": MatmulAlphaBeta(Stabiliser(0.1)),
    "exact": MatmulAlphaBeta(EXACT),
    "reference": MatmulAlphaBeta(REFERENCE),
}


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_formula(name: str, rule: MatmulAlphaBeta, batch: int, targets: int) -> None:
    def oracle(relevance: Tensor, a: Tensor, b: Tensor) -> Parts:
        z = products(a, b).clamp(min=0)
        return halves(z, divide(relevance, z.sum(-2), rule.stabiliser), a, b)

    op, inputs = matmul_op(name), operands(name, batch)
    check_rule(op, rule, inputs, op.relevance(inputs, targets), oracle)  # no z+ cancels: nothing is left out


@pytest.mark.parametrize("name", SHAPES)
def test_ledger(name: str) -> None:
    op, inputs = matmul_op(name), operands(name, 4)
    entry = check_ledger(op, MatmulAlphaBeta(), inputs, op.relevance(inputs, 3), ["epsilon"])
    assert bool((entry.amplification <= 1 + 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pair_without_support_hands_on_nothing(dtype: torch.dtype) -> None:
    op, (a, b) = matmul_op("bmm"), operands("bmm", 4)
    for left in MatmulAlphaBeta().propagate(op.call([a.abs(), -b.abs()], dtype), random(3, 4, 3, 1).to(dtype)):
        assert left is not None
        assert not left.any()


def test_gradient() -> None:
    op, inputs = matmul_op("bmm"), [away_from_zero(x) for x in operands("bmm", 2, zeros=False)]
    check_gradient(op, MatmulAlphaBeta(Stabiliser(0.1)), inputs, op.relevance(inputs, 2))
