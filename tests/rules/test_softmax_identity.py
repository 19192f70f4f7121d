from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import SoftmaxIdentity
from tests.rules.rule_checks import SIZES, Op, Parts, check_ledger, check_rule, module_of, random


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("size", [1, 63])
def test_formula(size: int, batch: int, targets: int) -> None:
    op = Op(module_of(lambda x: x.softmax(-1)), random(2, 7, size), kind="softmax")
    x = random(batch, 7, size, zeros=True)

    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        return (relevance,)

    check_rule(op, SoftmaxIdentity(), [x], op.relevance([x], targets), oracle)


def test_ledger() -> None:
    op = Op(module_of(lambda x: x.softmax(-1)), random(2, 7), kind="softmax")
    entry = check_ledger(op, SoftmaxIdentity(), [random(4, 7)], random(3, 4, 7), [])
    assert torch.equal(entry.passed, entry.arriving)


def test_inside_attention() -> None:
    relevance = random(3, 4, 2, 7, 7)
    assert SoftmaxIdentity().through(random(4, 2, 7, 7), random(4, 2, 7, 7), relevance) is relevance
