from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import AddEpsilon, AddGamma, Stabiliser
from tests.rules.add_checks import CASES, add_op, handed_out, operands, settled
from tests.rules.rule_checks import (
    SIZES,
    Parts,
    assert_parts,
    away_from_zero,
    check_gradient,
    check_ledger,
    check_rule,
    divide,
    random,
)

RULES = {"default": AddGamma(), "strong": AddGamma(10.0), "coarse": AddGamma(0.25, Stabiliser(0.1))}


def preferred(gamma: float, a: Tensor, b: Tensor) -> Tensor:
    """(1 + gamma) a where a has the sum's sign, a elsewhere."""
    agrees = torch.sign(a) * torch.sign(a + b) > 0
    return a + gamma * a * agrees


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, rule: AddGamma, batch: int, targets: int) -> None:
    def oracle(relevance: Tensor, *inputs: Tensor) -> Parts:
        a, b = CASES[name].summands(*inputs)
        zero = a + b == 0
        a, b = preferred(rule.gamma, a, b), preferred(rule.gamma, b, a)
        s = divide(relevance, a + b, rule.stabiliser)
        parts = (torch.where(zero, relevance / 2, a * s), torch.where(zero, relevance / 2, b * s))
        return handed_out(name, parts, inputs)

    op, inputs = add_op(name), operands(name, batch)
    check_rule(op, rule, inputs, op.relevance(inputs, targets), oracle, settled(name))


@pytest.mark.parametrize("name", CASES)
def test_ledger(name: str) -> None:
    op, inputs = add_op(name), operands(name, 4)
    causes = ["epsilon", "constant"] if CASES[name].carrying == 1 else ["epsilon"]
    check_ledger(op, AddGamma(), inputs, op.relevance(inputs, 3), causes)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_amplification_is_bounded(gamma: float) -> None:
    """By 1 + 2 / gamma per element, also for summands that all but cancel, where plain shares have no bound."""
    op, a = add_op("residual"), random(4, 3, 63)
    b = -a * (1 + 10.0 ** -torch.arange(1, 7).double().repeat(2 * 63))[: a.numel()].reshape(a.shape)
    relevance = op.relevance([a, b], 3)
    first, second = AddGamma(gamma).propagate(op.call([a, b]), relevance)
    plain = AddEpsilon().propagate(op.call([a, b]), relevance)[0]
    assert first is not None and second is not None and plain is not None
    bound = (1 + 2 / gamma) * relevance.abs()
    assert bool((first.abs() + second.abs() <= bound * (1 + 1e-9)).all())
    assert bool((plain.abs() > bound).any())


@pytest.mark.parametrize("size", [0.0, 2.5])
def test_cancelled_sum_goes_half_each_way(size: float) -> None:
    op, a = add_op("residual"), torch.full((4, 3, 63), size, dtype=torch.float64)
    relevance = op.relevance([a, -a], 3)
    for part in AddGamma().propagate(op.call([a, -a]), relevance):
        assert part is not None and torch.equal(part, relevance / 2)
    entry = check_ledger(op, AddGamma(), [a, -a], relevance, ["epsilon"])
    assert not entry.absorbed["epsilon"].any()


def test_gamma_zero_is_epsilon() -> None:
    op, inputs = add_op("residual"), operands("residual", 4, zeros=False)
    relevance, stabiliser = op.relevance(inputs, 3), Stabiliser(1e-6)
    got = AddGamma(0.0, stabiliser).propagate(op.call(inputs), relevance)
    assert_parts(got, AddEpsilon(stabiliser).propagate(op.call(inputs), relevance), 1e-13)


def test_gradient() -> None:
    op, a = add_op("difference"), away_from_zero(random(2, 3, 7))
    inputs = [a, 0.5 * away_from_zero(random(2, 3, 7, seed=2))]
    difference = (inputs[0] - inputs[1]).abs() > 0.05
    check_gradient(op, AddGamma(stabiliser=Stabiliser(0.1)), inputs, op.relevance(inputs, 2) * difference)
