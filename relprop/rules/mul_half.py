"""Elementwise products: a constant factor takes nothing, two activations get half each."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.graph import Node, Value
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule, unbroadcast
from relprop.rules.modified_gradient import ModifiedGradient, scaled


@register_rule
class MulHalf(Rule):
    """R_a = R_b = R / 2 for a product of two activations; all of R to the one factor that carries any.

    Conservation:
        exact.
    Source: Achtibat et al., ICML 2024, prop. 3.2.
    """

    kind: ClassVar = "mul"
    name: ClassVar = "half"
    needs_inputs: ClassVar = False
    needs_output: ClassVar = False

    def gradient_form(self, node: Node) -> Rule | None:
        """Half the gradient for each of two activations, the gradient for one."""
        if sum(v is not None and v.carrying for v in node.operands) < 2:
            return plain_gradient()
        return ModifiedGradient(self, _half_gradient)

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> [T, ...] per carrying factor."""
        carrying = [v is not None and v.carrying for v in call.node.operands]
        part = relevance / 2 if sum(carrying) > 1 else relevance
        return tuple(unbroadcast(part, call.shape(i)) if c else None for i, c in enumerate(carrying))


def _half_gradient(call: Call, gradient: Tensor) -> Relevances:
    return scaled(plain_gradient().propagate(call, gradient), (0.5, 0.5 * turned(call.node)))


def turned(node: Node) -> float:
    """-1 for a quotient, whose gradient by the second operand b is that of a product times -1: b dy/db = -y."""
    return -1.0 if node.target is torch.ops.aten.div.Tensor else 1.0


def is_gate(value: Value) -> bool:
    """Whether a factor comes straight out of a non-linearity."""
    node = value.producer
    while node is not None and node.kind in ("fanout", "movement"):
        source = next((v for v in node.operands if v is not None and v.carrying), None)
        node = source.producer if source else None
    return node is not None and node.kind in ("activation", "softmax")
