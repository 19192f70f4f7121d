"""Add of a position embedding, whose share belongs to its position."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.graph import Value
from relprop.rules.add_epsilon import summands
from relprop.rules.base import Call, Relevances, Rule, register_rule, unbroadcast
from relprop.rules.stabiliser import Stabiliser


@register_rule
class AddPositional(Rule):
    """R_x = x R / stab(x + p); R_p = p R / stab(x + p) stays here, per position.

    Args:
        stabiliser: of the share-out.
    Conservation:
        sum(R_x) = sum(R_out) - sum(R_p) - epsilon leak, per sample; R_p is absorbed as "position" and kept per token.
    Source: Bakish et al. 2025 (PA-LRP), section 4: position embeddings as inputs of their own.
    """

    kind: ClassVar = "add"
    name: ClassVar = "positional"
    needs_output: ClassVar = False
    stabiliser: Stabiliser = Stabiliser(1e-6)

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> [T, ...] at the carrying summand."""
        parts = summands(call)
        s = call.share(self.stabiliser, relevance, parts[0] + parts[1])
        results: list[Tensor | None] = []
        for argument, part in zip(call.node.args[:2], parts, strict=True):
            if isinstance(argument, Value) and argument.carrying:
                results.append(unbroadcast(part * s, call.shapes[argument.index]))
                continue
            call.keep_position(part * s, call.shapes[argument.index] if isinstance(argument, Value) else None)
            if isinstance(argument, Value):
                results.append(None)
        return tuple(results)
