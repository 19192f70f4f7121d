"""Product with a constant that says where a token is, as in rotary embeddings: the position gets half."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.rules.base import Call, Relevances, Rule, register_rule, unbroadcast
from relprop.rules.mul_half import MulHalf


@register_rule
class MulPositional(Rule):
    """R_x = R_p = R / 2 for x times a constant p of each position; R_p stays here. Two activations get half each.

    Conservation:
        sum(R_x) = sum(R_out) / 2; the other half is absorbed as "position" and kept per token.
    Source: Bakish et al. 2025 (PA-LRP), section 4: cosines and sines of rotary embeddings as inputs of their own.
    """

    kind: ClassVar = "mul"
    name: ClassVar = "positional"
    needs_inputs: ClassVar = False
    needs_output: ClassVar = False

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> [T, ...] at the carrying factor."""
        operands = call.node.operands
        constant = next((i for i, v in enumerate(operands) if v is not None and not v.carrying), None)
        if constant is None:
            return MulHalf().propagate(call, relevance)
        half = relevance / 2
        call.keep_position(half, call.shape(constant))
        return tuple(
            unbroadcast(half, call.shape(i)) if v is not None and v.carrying else None for i, v in enumerate(operands)
        )
