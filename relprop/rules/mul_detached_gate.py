"""Gated products: the gate is held constant."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.rules.base import Call, Relevances, Rule, register_rule, unbroadcast
from relprop.rules.mul_half import MulHalf, is_gate


@register_rule
class MulDetachedGate(Rule):
    """R_value = R, R_gate = 0; the gate is the factor that comes out of a non-linearity (else the first).

    Conservation:
        exact.
    Source: Ali et al., ICML 2022 (CP-LRP), as its gates are detached in the efficient code of AttnLRP.
    """

    kind: ClassVar = "mul"
    name: ClassVar = "detached_gate"
    needs_inputs: ClassVar = False
    needs_output: ClassVar = False

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> [T, ...] per carrying factor, zeros at the gate."""
        operands = call.node.operands
        carrying = [i for i, v in enumerate(operands) if v is not None and v.carrying]
        if len(carrying) < 2:
            return MulHalf().propagate(call, relevance)
        gates = [i for i in carrying if is_gate(operands[i])]  # type: ignore[arg-type]
        gate = gates[0] if gates else carrying[0]
        parts: list[Tensor | None] = [None] * len(operands)
        for i in carrying:
            part = unbroadcast(relevance, call.shape(i))
            parts[i] = part * 0 if i == gate else part
        return tuple(parts)
