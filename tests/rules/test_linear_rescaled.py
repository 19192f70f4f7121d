from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import REFERENCE, LinearAlphaBeta, LinearEpsilon, LinearRescaled, Stabiliser
from tests.rules.linear_checks import CASES, Dense, check_linear_rule, linear_op
from tests.rules.rule_checks import SIZES, assert_near, check_gradient, check_ledger, divide, random

RULES = {
    "default": LinearRescaled(),
    "reference": LinearRescaled(LinearAlphaBeta(stabiliser=REFERENCE), REFERENCE),
    "coarse": LinearRescaled(stabiliser=Stabiliser(0.5)),
}


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, rule: LinearRescaled, batch: int, targets: int) -> None:
    def formula(layer: Dense, relevance: Tensor) -> Tensor:
        positive = layer.contributions.clamp(min=0)
        s = divide(relevance, positive.sum(-1), rule.inner.stabiliser)  # type: ignore[attr-defined]
        plain = torch.einsum("bnk,tbn->tbk", positive, s)
        return plain * divide(relevance.sum(-1), plain.sum(-1), rule.stabiliser)[..., None]

    check_linear_rule(name, rule, formula, batch, targets)


@pytest.mark.parametrize("name", ["linear", "conv2d-groups"])
def test_what_the_inner_rule_keeps_is_given_back(name: str) -> None:
    """The bias's share, and that of a coarse epsilon."""
    op, x = linear_op(name), random(4, *CASES[name].shape, seed=3)
    relevance = op.relevance([x], 3)
    inner = LinearEpsilon(Stabiliser(0.5))
    arrived = relevance.flatten(2).sum(-1)
    kept = inner.propagate(op.call([x]), relevance)[0]
    assert kept is not None
    assert ((kept.flatten(2).sum(-1) - arrived).abs() > 1e-2 * arrived.abs()).all()
    entry = check_ledger(op, LinearRescaled(inner), [x], relevance, ["epsilon"])
    assert_near(entry.passed, arrived, 1e-7)


def test_nothing_to_scale() -> None:
    """An input of zeros has no share, whatever arrives."""
    op, x = linear_op("linear"), torch.zeros(2, *CASES["linear"].shape, dtype=torch.float64)
    relevance = torch.ones(1, *op.output([x]).shape, dtype=torch.float64)
    found = RULES["reference"].propagate(op.call([x]), relevance)[0]
    assert found is not None
    assert torch.equal(found, torch.zeros_like(found))


def test_gradient() -> None:
    op, x = linear_op("linear"), random(2, *CASES["linear"].shape, seed=2)
    check_gradient(op, LinearRescaled(), [x], op.relevance([x], 2))
