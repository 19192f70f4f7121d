"""Floating-point operations and bytes of a step, counted from shapes for one sample."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from relprop.graph import Node, Value
from relprop.rules import Gradient, ModifiedGradient, Rule
from relprop.rules.attention_composed import AttentionComposed
from relprop.rules.linear_alpha_beta import LinearAlphaBeta
from relprop.rules.linear_flat import LinearFlat
from relprop.rules.linear_gamma import LinearGamma
from relprop.rules.linear_z_box import LinearZBox


def sizes(value: Value, batch_symbols: frozenset[Any]) -> list[int]:
    """Sizes at batch one, other free sizes as in the example."""
    result = []
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            one = {s: 1 for s in size.node.expr.free_symbols & batch_symbols}
            expression = size.node.expr.subs(one)
            hints = size.node.shape_env.backed_var_to_val if hasattr(size.node.shape_env, "backed_var_to_val") else {}
            hints = hints or getattr(size.node.shape_env, "var_to_val", {})
            result.append(int(expression.subs({s: hints[s] for s in expression.free_symbols})))
        else:
            result.append(int(size))
    return result


def forward_flops(node: Node, batch_symbols: frozenset[Any]) -> int:
    """Of the matrix products; two per multiply-add."""
    if node.kind in ("linear", "conv"):
        weight = node.operands[1]
        assert weight is not None
        out = sizes(node.outputs[0], batch_symbols)
        if node.kind == "linear":
            return 2 * prod(out) * sizes(weight, batch_symbols)[1]
        return 2 * prod(out) * prod(sizes(weight, batch_symbols)[1:])
    if node.kind == "matmul":
        a = node.operands[0]
        assert a is not None
        return 2 * prod(sizes(node.outputs[0], batch_symbols)) * sizes(a, batch_symbols)[-1]
    if node.kind == "attention":
        q, k = node.operands[0], node.operands[1]
        assert q is not None and k is not None
        return 4 * prod(sizes(q, batch_symbols)) * sizes(k, batch_symbols)[-2]
    return 0


def products(node: Node, rule: Rule, stream: str, wanted: Sequence[bool]) -> float:
    """How many of the forward pass's products one reverse step of one stream makes."""
    if node.kind in ("linear", "conv"):
        if isinstance(rule, LinearAlphaBeta):
            return 3 if rule.joint else 4
        if isinstance(rule, (LinearGamma,)):
            return 3
        if isinstance(rule, LinearZBox):
            return 5
        return 2 if isinstance(rule, LinearFlat) else 1
    if isinstance(rule, (Gradient, ModifiedGradient)):
        stream = "gradient"
    if node.kind == "matmul":
        return 1 if stream == "gradient" else 3
    if node.kind == "attention":
        # Two products make the forward: each of the products below counts one half.
        if stream == "gradient":
            factors = getattr(rule, "factors", None) or (1.0, 1.0, 1.0)
            made = [want and factor != 0.0 for want, factor in zip(wanted[:3], factors, strict=False)]
            return (1 + any(made[:2]) + sum(made)) / 2
        one = isinstance(rule, AttentionComposed) and rule.qk.name == "alpha_beta"
        detached = isinstance(rule, AttentionComposed) and rule.softmax.name == "detached"
        through = 0 if detached else (1 + one) * sum(wanted[:2]) + one * any(wanted[:2])
        return (1 + 1 + wanted[2] + through) / 2
    return 0


def nbytes(values: Sequence[Value | None], batch_symbols: frozenset[Any]) -> int:
    """Bytes of values read or written once."""
    return sum(prod(sizes(v, batch_symbols)) * v.dtype.itemsize for v in values if v is not None and v.shape)
