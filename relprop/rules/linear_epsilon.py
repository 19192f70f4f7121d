"""Epsilon rule for linear layers and convolutions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule
from relprop.rules.linear_map import bias_of, preactivation, transpose, weight_of
from relprop.rules.stabiliser import Stabiliser


@register_rule
class LinearEpsilon(Rule):
    """R_in = x * (W^T s), s = R / stab(z), z = W x + b; the bias absorbs its share b s.

    Args:
        stabiliser: of the share-out.
        bias: whether the bias takes a share; without, z = W x.
    Conservation:
        sum(R_in) = sum(R_out) - bias share - epsilon leak, per sample.
    Source: Bach et al., PLoS ONE 2015; Achtibat et al., ICML 2024, eq. 8.
    """

    kind: ClassVar = ("linear", "conv")
    name: ClassVar = "epsilon"
    stabiliser: Stabiliser = Stabiliser(1e-6)
    bias: bool = True

    def gradient_form(self, node: Node) -> Rule | None:
        """The plain gradient, where nothing is stabilised."""
        return plain_gradient() if self.stabiliser.is_exact and self.bias else None

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., N] -> ([T, ..., K], None, None)."""
        z = preactivation(call)
        bias = bias_of(call) if self.bias else None
        if bias is not None:
            z = z + bias
        s = call.share(self.stabiliser, relevance, z)
        if bias is not None and call.absorbed is not None:
            call.absorb("bias", s * bias)
        return call.x * transpose(call, s, weight_of(call)), None, None
