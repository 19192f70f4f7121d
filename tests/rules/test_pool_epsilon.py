from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from relprop.rules import PoolEpsilon, Stabiliser
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

# Function, shape of a sample, and the weight of every input in every output, from flattened samples.
POOLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "mean-of-tokens": (lambda x: x.mean(1), (7, 5)),
    "mean-of-two-axes": (lambda x: x.mean((-1, -2), keepdim=True), (3, 5, 5)),
    "sum": (lambda x: x.sum(1), (63, 2)),
    "average": (lambda x: F.avg_pool2d(x, 2), (3, 4, 6)),
    "average-padded": (lambda x: F.avg_pool2d(x, 3, stride=2, padding=1), (2, 5, 5)),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (2, 5, 7)),
    "adaptive-1d": (lambda x: F.adaptive_avg_pool1d(x, 1), (3, 7)),
    "maximum": (lambda x: x.amax(1), (7, 5)),
    "maximum-windows": (lambda x: F.max_pool2d(x, 2), (3, 4, 6)),
}
RULES = {"default": PoolEpsilon(), "coarse": PoolEpsilon(Stabiliser(0.1))}


@functools.cache
def pool_op(name: str) -> Op:
    function, shape = POOLS[name]
    return Op(module_of(function), random(2, *shape), kind="pool")


def winners(name: str, x: Tensor) -> Tensor:
    """Entry by entry: 1 where an input is the maximum that an output shows. [B, outputs, inputs]"""
    outputs, inputs = POOLS[name][0](x), torch.arange(x[0].numel()).reshape(x.shape[1:])
    weights = torch.zeros(len(x), outputs[0].numel(), x[0].numel(), dtype=x.dtype)
    places = list(product(*(range(size) for size in outputs.shape[1:])))
    for sample, (at, place) in product(range(len(x)), enumerate(places)):
        if name == "maximum":
            seen = inputs[:, place[0]]
        else:
            channel, row, column = place
            seen = inputs[channel, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1)
        values = x[sample].reshape(-1)[seen]
        weights[sample, at, seen[values.argmax()]] = 1.0
    return weights


def pooled(name: str, x: Tensor) -> Tensor:
    """Weight of every input in every output. [B, outputs, inputs]"""
    if name.startswith("maximum"):
        return winners(name, x)
    size = x[0].numel()
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *x.shape[1:])
    return POOLS[name][0](basis).reshape(size, -1).T.expand(len(x), -1, -1)


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", POOLS)
def test_formula(name: str, rule: PoolEpsilon, batch: int, targets: int) -> None:
    def contributions(x: Tensor) -> Tensor:
        return pooled(name, x) * x.flatten(1)[:, None, :]

    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        z = contributions(x)
        s = divide(relevance.flatten(2), z.sum(-1), rule.stabiliser)
        return (torch.einsum("bnk,tbn->tbk", z, s).reshape(len(relevance), *x.shape),)

    def settled(x: Tensor) -> Tensor:
        z = contributions(x)
        return (z.sum(-1).abs() > z.abs().sum(-1) / 50).reshape(POOLS[name][0](x).shape)

    # Distinct numbers but for one zero: a maximum has one winner.
    op, x = pool_op(name), random(batch, *POOLS[name][1], seed=batch)
    x.view(batch, -1)[:, 0] = 0.0
    check_rule(op, rule, [x], op.relevance([x], targets), oracle, settled)


@pytest.mark.parametrize("name", POOLS)
def test_ledger(name: str) -> None:
    op, x = pool_op(name), random(4, *POOLS[name][1], seed=2).abs() + 0.1
    relevance = op.relevance([x], 3)
    entry = check_ledger(op, PoolEpsilon(), [x], relevance, ["epsilon"])
    assert_near(entry.passed, relevance.flatten(2).sum(-1), 1e-7)


@pytest.mark.parametrize("name", ["mean-of-tokens", "average-padded", "maximum"])
def test_gradient(name: str) -> None:
    op, x = pool_op(name), random(2, *POOLS[name][1])
    check_gradient(op, RULES["coarse"], [x], op.relevance([x], 1))
