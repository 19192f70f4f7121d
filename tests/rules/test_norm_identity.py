from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from relprop.rules import NormIdentity
from tests.rules.rule_checks import SIZES, Op, Parts, check_ledger, check_rule, random

NORMS = {
    "layer": (lambda: nn.LayerNorm(63), (7, 63)),
    "rms": (lambda: nn.RMSNorm(7), (7,)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "batch": (lambda: nn.BatchNorm2d(3), (3, 5, 5)),
}


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("name", NORMS)
def test_formula(name: str, batch: int, targets: int) -> None:
    make, shape = NORMS[name]
    op, x = Op(make(), random(2, *shape), kind="norm"), random(batch, *shape, zeros=True)

    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        return (relevance, *[None] * (len(op.node.operands) - 1))

    check_rule(op, NormIdentity(), [x], op.relevance([x], targets), oracle)


def test_ledger() -> None:
    op, x = Op(nn.LayerNorm(7), random(2, 5, 7), kind="norm"), random(4, 5, 7)
    entry = check_ledger(op, NormIdentity(), [x], op.relevance([x], 3), [])
    assert torch.equal(entry.passed, entry.arriving)
