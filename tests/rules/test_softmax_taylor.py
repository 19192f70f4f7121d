from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relprop.rules import SoftmaxTaylor
from tests.rules.rule_checks import (
    SIZES,
    Op,
    Parts,
    assert_near,
    check_gradient,
    check_ledger,
    check_rule,
    module_of,
    random,
)


def softmax_op(axis: int) -> Op:
    return Op(module_of(lambda x: x.softmax(axis)), random(2, 3, 7, 5), kind="softmax")


def expansion(relevance: Tensor, x: Tensor) -> Tensor:
    """x[i] sum over j of R[j] / p[j] dp[j]/dx[i], the first-order term, along the last axis."""
    p = x.exp() / x.exp().sum(-1, keepdim=True)
    identity = torch.eye(x.shape[-1], dtype=x.dtype)
    jacobian = p[..., :, None] * (identity - p[..., None, :])  # dp[j]/dx[i] at [j, i]
    return x * torch.einsum("t...j,...ji->t...i", relevance / p, jacobian)


@pytest.mark.parametrize(("batch", "targets"), SIZES)
@pytest.mark.parametrize("axis", [-1, 1, 2, -2])
def test_formula(axis: int, batch: int, targets: int) -> None:
    op, x = softmax_op(axis), random(batch, 3, 7, 5, zeros=True)

    def oracle(relevance: Tensor, x: Tensor) -> Parts:
        at = axis % x.ndim
        return (expansion(relevance.movedim(at + 1, -1), x.movedim(at, -1)).movedim(-1, at + 1),)

    check_rule(op, SoftmaxTaylor(), [x], op.relevance([x], targets), oracle)


def test_masked_logits_get_nothing() -> None:
    op, x = Op(module_of(lambda x: x.softmax(-1)), random(2, 7), kind="softmax"), random(4, 7)
    relevance = random(3, 4, 7)
    relevance[..., 5:] = 0.0
    whole = SoftmaxTaylor().propagate(op.call([x[:, :5]]), relevance[..., :5])[0]
    x[:, 5:] = -torch.inf
    masked = SoftmaxTaylor().propagate(op.call([x]), relevance)[0]
    assert whole is not None and masked is not None
    assert_near(masked[..., :5], whole, 1e-13)
    assert not masked[..., 5:].any()


def test_one_entry_gets_nothing() -> None:
    """A softmax over one entry is constant."""
    op = Op(module_of(lambda x: x.softmax(-1)), random(2, 1), kind="softmax")
    found = SoftmaxTaylor().propagate(op.call([random(4, 1)]), random(3, 4, 1))[0]
    assert found is not None
    assert not found.any()


def test_ledger() -> None:
    op, x = softmax_op(-1), random(4, 3, 7, 5)
    relevance = op.relevance([x], 3)
    entry = check_ledger(op, SoftmaxTaylor(), [x], relevance, ["rule"])
    assert_near(entry.absorbed["rule"], (relevance - expansion(relevance, x)).flatten(2).sum(-1), 1e-10)


@pytest.mark.parametrize("axis", [-1, 1])
def test_gradient(axis: int) -> None:
    op, x = softmax_op(axis), random(2, 2, 3, 2)
    check_gradient(op, SoftmaxTaylor(), [x], op.relevance([x], 2))
