from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import LinearFlat, Stabiliser
from tests.rules.linear_checks import CASES, Dense, check_linear_rule, linear_op
from tests.rules.rule_checks import SIZES, assert_near, check_ledger, divide, random

RULES = {"default": LinearFlat(), "coarse": LinearFlat(Stabiliser(0.5))}


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", CASES)
def test_formula(name: str, rule: LinearFlat, batch: int, targets: int) -> None:
    def formula(layer: Dense, relevance: Tensor) -> Tensor:
        s = divide(relevance, layer.reach.sum(-1), rule.stabiliser)
        return torch.einsum("nk,tbn->tbk", layer.reach, s)

    check_linear_rule(name, rule, formula, batch, targets)


@pytest.mark.parametrize("name", CASES)
def test_ledger(name: str) -> None:
    op, x = linear_op(name), random(4, *CASES[name].shape, seed=3)
    relevance = op.relevance([x], 3)
    entry = check_ledger(op, LinearFlat(), [x], relevance, ["epsilon"])
    if name != "conv3d":  # its corners see padding alone, and keep their relevance
        assert_near(entry.passed, relevance.flatten(2).sum(-1), 1e-8)
