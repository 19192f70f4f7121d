"""Inputs of a linear layer and its rule in float64, for the tests of the linear kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from relprop.rules import Rule
from tests.kernels.kernel_checks import random
from tests.rules.rule_checks import call_by_hand


def case(dtype: torch.dtype, targets: int, rows: int, n: int, k: int, zeros: bool = False) -> dict[str, Tensor]:
    """x, w, bias in a dtype and relevance of [T, M, N] in float32."""
    return {
        "x": random(rows, k, seed=1, dtype=dtype, zeros=zeros),
        "w": random(n, k, seed=2, dtype=dtype, zeros=zeros),
        "bias": random(n, seed=3, dtype=dtype),
        "relevance": random(targets, rows, n, seed=4),
    }


def output_of(given: dict[str, Tensor]) -> Tensor:
    """y in float32. [M, N]"""
    return (given["x"].double() @ given["w"].double().T + given["bias"].double()).float()


def by_rule(rule: Rule, given: dict[str, Tensor]) -> Tensor:
    """R_in in float64. [T, M, K]"""
    x, w, bias = (given[name].double() for name in ("x", "w", "bias"))
    call = call_by_hand("linear", torch.ops.aten.linear.default, (x, w, bias), x @ w.T + bias)
    found = rule.propagate(call, given["relevance"].double())[0]
    assert found is not None
    return found
