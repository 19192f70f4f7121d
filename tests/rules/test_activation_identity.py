from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relprop.rules import ActivationIdentity
from tests.rules.rule_checks import SIZES, Op, Parts, check_ledger, check_rule, module_of, random

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky-relu": lambda x: F.leaky_relu(x, 0.2),
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@functools.cache
def activation_op(name: str) -> Op:
    return Op(module_of(ACTIVATIONS[name]), random(2, 3, 7), kind="activation")


def padded(op: Op, part: Tensor) -> Parts:
    return (part, *[None] * (len(op.node.operands) - 1))


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula(name: str, batch: int, targets: int) -> None:
    op, x = activation_op(name), random(batch, 3, 7, zeros=True)
    check_rule(op, ActivationIdentity(), [x], op.relevance([x], targets), lambda r, x: padded(op, r))


def test_ledger() -> None:
    op, x = activation_op("gelu"), random(4, 3, 7)
    entry = check_ledger(op, ActivationIdentity(), [x], op.relevance([x], 3), [])
    assert torch.equal(entry.passed, entry.arriving)
