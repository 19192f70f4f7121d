"""Elementwise non-linearities as a product with their slope f(x) / x."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.modified_gradient import ModifiedGradient
from relprop.rules.stabiliser import EXACT, Stabiliser


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

    def gradient_form(self, node: Node) -> Rule | None:
        """The slope f(x) / x in place of the derivative."""
        if not self.stabiliser.is_exact:
            return None
        return ModifiedGradient(self, _slope, output=True)

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ...] -> ([T, ...], None, ...)."""
        x, y = call.x, call.y
        received = x * self.stabiliser.share(y, x) * self.stabiliser.share(relevance, y)
        call.absorb("epsilon", relevance - received)
        return (received, *[None] * (len(call.node.operands) - 1))


def _slope(call: Call, gradient: Tensor) -> Relevances:
    slope = EXACT.share(call.y, call.x)
    return (gradient * slope, *[None] * (len(call.node.operands) - 1))
