from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from relprop.rules import EXACT, REFERENCE, MatmulHalf, Stabiliser
from tests.rules.rule_checks import (
    SIZES,
    Op,
    Parts,
    assert_near,
    check_gradient,
    check_ledger,
    check_rule,
    divide,
    module_of,
    random,
)

# Shapes of one sample's operands.
SHAPES = {
    "heads": ((2, 7, 63), (2, 63, 5)),
    "one": ((1, 1), (1, 1)),
    "bmm": ((3, 7), (7, 1)),
    "shared-right": ((3, 5, 7), (1, 7, 4)),
    "shared-left": ((1, 5, 7), (3, 7, 4)),
}
RULES = {
    "default": MatmulHalf(),
    "coarse": MatmulHalf(Stabiliser(0.1)),
    "exact": MatmulHalf(EXACT),
    "reference": MatmulHalf(REFERENCE),
}


@functools.cache
def matmul_op(name: str) -> Op:
    a, b = SHAPES[name]
    return Op(module_of(lambda a, b: a @ b, 2), random(2, *a), random(2, *b), kind="matmul")


def operands(name: str, batch: int, zeros: bool = True) -> list[Tensor]:
    return [random(batch, *shape, seed=i, zeros=zeros and shape != (1, 1)) for i, shape in enumerate(SHAPES[name])]


def products(a: Tensor, b: Tensor) -> Tensor:
    """a[i, k] b[k, j] for every i, j, k. [..., M, K, N]"""
    return a[..., :, :, None] * b[..., None, :, :]


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """Sum over the heads that share an operand. [T, ...] -> [T, *shape of like]"""
    for axis, size in enumerate(like.shape):
        if size == 1:
            part = part.sum(axis + 1, keepdim=True)
    return part


def halves(contributions: Tensor, s: Tensor, a: Tensor, b: Tensor) -> Parts:
    """Half of every contribution's share to each of its two factors."""
    parts = contributions * s[..., :, None, :] / 2  # [T, ..., M, K, N]
    return gathered(parts.sum(-1), a), gathered(parts.sum(-3), b)


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_formula(name: str, rule: MatmulHalf, batch: int, targets: int) -> None:
    def oracle(relevance: Tensor, a: Tensor, b: Tensor) -> Parts:
        z = products(a, b)
        return halves(z, divide(relevance, z.sum(-2), rule.stabiliser), a, b)

    def settled(a: Tensor, b: Tensor) -> Tensor:
        z = products(a, b)
        return z.sum(-2).abs() > z.abs().sum(-2) / 50

    op, inputs = matmul_op(name), operands(name, batch)
    check_rule(op, rule, inputs, op.relevance(inputs, targets), oracle, settled)


@pytest.mark.parametrize("name", SHAPES)
def test_ledger(name: str) -> None:
    op, inputs = matmul_op(name), operands(name, 4, zeros=False)
    relevance = op.relevance(inputs, 3)
    entry = check_ledger(op, MatmulHalf(), inputs, relevance, ["epsilon"])
    assert_near(entry.passed, relevance.flatten(2).sum(-1), 1e-5)  # epsilon 1e-9 against the smallest product
    check_ledger(op, RULES["coarse"], inputs, relevance, ["epsilon"])


def test_both_operands_get_as_much() -> None:
    op, inputs = matmul_op("heads"), operands("heads", 4)
    left, right = MatmulHalf().propagate(op.call(inputs), op.relevance(inputs, 3))
    assert left is not None and right is not None
    assert_near(left.flatten(2).sum(-1), right.flatten(2).sum(-1), 1e-9)


def test_only_what_is_wanted() -> None:
    op, inputs = matmul_op("heads"), operands("heads", 4)
    call, relevance = op.call(inputs), op.relevance(inputs, 3)
    both = MatmulHalf().propagate(call, relevance)
    call.wanted = (False, True)
    left, right = MatmulHalf().propagate(call, relevance)
    assert left is None
    assert both[1] is not None and right is not None and torch.equal(right, both[1])


@pytest.mark.parametrize("name", ["bmm", "shared-right"])
def test_gradient(name: str) -> None:
    op, inputs = matmul_op(name), [x[:, :1] if x.ndim == 4 else x for x in operands(name, 2, zeros=False)]
    check_gradient(op, MatmulHalf(Stabiliser(0.1)), inputs, op.relevance(inputs, 2))
