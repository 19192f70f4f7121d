"""Gated products: the gate is held constant."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule, unbroadcast
from relprop.rules.modified_gradient import ModifiedGradient, scaled
from relprop.rules.mul_half import MulHalf, is_gate, turned
from relprop.rules.stabiliser import EXACT, Stabiliser


@register_rule
class MulDetachedGate(Rule):
    """R_value = y R / stab(y), R_gate = 0; the gate is the factor that comes out of a non-linearity (else the first).

    Args:
        stabiliser: of the division by the product y; exact hands on all of R.
    Conservation:
        sum(R_in) = sum(R_out) - epsilon leak, per sample.
    Source: Ali et al., ICML 2022 (CP-LRP), as the efficient code of AttnLRP detaches gates; its explicit code has an
    epsilon.
    """

    kind: ClassVar = "mul"
    name: ClassVar = "detached_gate"
    needs_inputs: ClassVar = False
    stabiliser: Stabiliser = EXACT

    @property
    def needs_output(self) -> bool:  # type: ignore[override]
        return not self.stabiliser.is_exact

    def gradient_form(self, node: Node) -> Rule | None:
        """The gradient of the value alone."""
        if not self.stabiliser.is_exact:
            return None
        if sum(v is not None and v.carrying for v in node.operands) < 2:
            return plain_gradient()
        return ModifiedGradient(self, _value_gradient)

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> [T, ...] per carrying factor, zeros at the gate."""
        operands = call.node.operands
        carrying = [i for i, v in enumerate(operands) if v is not None and v.carrying]
        if len(carrying) < 2:
            return MulHalf().propagate(call, relevance)
        if not self.stabiliser.is_exact:
            arriving, relevance = relevance, call.y * self.stabiliser.share(relevance, call.y)
            call.absorb("epsilon", arriving - relevance)
        gate = gate_of(call.node)
        parts: list[Tensor | None] = [None] * len(operands)
        for i in carrying:
            part = unbroadcast(relevance, call.shape(i))
            parts[i] = part * 0 if i == gate else part
        return tuple(parts)


def gate_of(node: Node) -> int:
    """Which factor is the gate."""
    carrying = [i for i, v in enumerate(node.operands) if v is not None and v.carrying]
    gates = [i for i in carrying if is_gate(node.operands[i])]  # type: ignore[arg-type]
    return gates[0] if gates else carrying[0]


def _value_gradient(call: Call, gradient: Tensor) -> Relevances:
    gate = gate_of(call.node)
    factors = tuple(0.0 if i == gate else (1.0, turned(call.node))[i] for i in range(2))
    return scaled(plain_gradient().propagate(call, gradient), factors)
