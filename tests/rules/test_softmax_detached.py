from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import SoftmaxDetached
from tests.rules.rule_checks import SIZES, Op, Parts, assert_near, check_ledger, check_rule, module_of, random


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("size", [1, 63])
def test_formula(size: int, batch: int, targets: int) -> None:
    op = Op(module_of(lambda x: x.softmax(-1)), random(2, 7, size), kind="softmax")
    x = random(batch, 7, size, zeros=True)

    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        return (torch.zeros(targets, *x.shape),)

    check_rule(op, SoftmaxDetached(), [x], op.relevance([x], targets), oracle)


def test_ledger() -> None:
    op = Op(module_of(lambda x: x.softmax(-1)), random(2, 3, 7), kind="softmax")
    relevance = random(3, 4, 3, 7)
    entry = check_ledger(op, SoftmaxDetached(), [random(4, 3, 7)], relevance, ["constant"])
    assert_near(entry.absorbed["constant"], relevance.sum((-1, -2)), 1e-12)


def test_inside_attention_nothing_passes() -> None:
    assert SoftmaxDetached().through(random(4, 7), random(4, 7), random(3, 4, 7)) is None
