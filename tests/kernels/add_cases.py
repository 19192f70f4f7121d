"""Inputs of a residual add and its rules in float64, for the tests of the add kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.rules import Rule, Stabiliser
from tests.kernels.kernel_checks import random
from tests.rules.rule_checks import call_by_hand

SIZES = [(1,), (63,), (5, 7, 31)]


def stabiliser_of(code: tuple[int, float]) -> Stabiliser:
    return Stabiliser(code[1], ("signed", "reference")[code[0]])


def case(
    dtype: torch.dtype, targets: int, batch: int, shape: tuple[int, ...], shared: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance, a, b. No sum a + b cancels by more than a factor of a few: float32 could not tell what is left."""
    a = random(batch, *shape, seed=1, dtype=dtype)
    b = random(1 if shared else batch, *shape, seed=2, dtype=dtype)
    y = a.float() + b.float()
    kept = y.abs() > 0.2 * (a.float().abs() + b.float().abs())
    return random(targets, batch, *shape, seed=3) * kept, a, b


def by_rule(rule: Rule, relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """R_a and R_b in float64; a shared b gets the sum over the batch."""
    a, b = a.double(), b.double()
    call = call_by_hand("add", torch.ops.aten.add.Tensor, (a, b), a + b)
    found = rule.propagate(call, relevance.double())
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


def summed(part: Tensor, like: Tensor) -> Tensor:
    """A part [T, B, ...] as the rule gives it to a shared summand."""
    return part.double().sum(1, keepdim=True) if like.shape[0] == 1 and part.shape[1] > 1 else part
