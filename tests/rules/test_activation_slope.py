from __future__ import annotations

import pytest
from torch import Tensor

from relprop.rules import ActivationIdentity, ActivationSlope, Stabiliser
from tests.rules.rule_checks import SIZES, Parts, assert_near, check_gradient, check_ledger, check_rule, divide, random
from tests.rules.test_activation_identity import ACTIVATIONS, activation_op, padded

RULES = {"default": ActivationSlope(), "coarse": ActivationSlope(Stabiliser(0.1))}


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula(name: str, rule: ActivationSlope, batch: int, targets: int) -> None:
    op, x = activation_op(name), random(batch, 3, 7, zeros=True)

    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        y = ACTIVATIONS[name](x)
        return padded(op, x * divide(y, x, rule.stabiliser) * divide(relevance, y, rule.stabiliser))

    check_rule(op, rule, [x], op.relevance([x], targets), oracle, lambda x: x.abs() > 0.05)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_identity_where_the_output_is_not_zero(name: str) -> None:
    op, x = activation_op(name), random(4, 3, 7).abs() + 0.1
    relevance = op.relevance([x], 3)
    got, want = (rule.propagate(op.call([x]), relevance)[0] for rule in (ActivationSlope(), ActivationIdentity()))
    assert got is not None and want is not None
    assert_near(got, want, 1e-8)  # two stabilisers of 1e-10 against values of 0.1 and more


def test_dead_unit_absorbs() -> None:
    op, x = activation_op("relu"), -random(4, 3, 7).abs()
    relevance = op.relevance([x], 3)
    entry = check_ledger(op, ActivationSlope(), [x], relevance, ["epsilon"])
    assert not entry.passed.any()
    assert_near(entry.absorbed["epsilon"], relevance.flatten(2).sum(-1), 1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_ledger(name: str) -> None:
    op, x = activation_op(name), random(4, 3, 7, zeros=True)
    check_ledger(op, RULES["coarse"], [x], op.relevance([x], 3), ["epsilon"])


def test_gradient() -> None:
    op, x = activation_op("gelu"), random(2, 3, 7).abs() + 0.3
    check_gradient(op, RULES["coarse"], [x], op.relevance([x], 2))
