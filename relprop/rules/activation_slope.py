"""Elementwise non-linearities as a product with their slope f(x) / x."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.stabiliser import Stabiliser


@register_rule
class ActivationSlope(Rule):
    """R_in = x * (f(x) / stab(x)) * R / stab(f(x)): the identity, up to the stabilisers.

    Args:
        stabiliser: of both divisions.
    Conservation:
        sum(R_in) = sum(R_out) - epsilon leak, per sample.
    Source: Achtibat et al., ICML 2024, eq. 9.
    """

    kind: ClassVar = "activation"
    name: ClassVar = "slope"
    stabiliser: Stabiliser = Stabiliser(1e-10)

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> ([T, ...], None, ...)."""
        x, y = call.x, call.y
        received = x * self.stabiliser.share(y, x) * self.stabiliser.share(relevance, y)
        call.absorb("epsilon", relevance - received)
        return (received, *[None] * (len(call.node.operands) - 1))
