"""Another rule's relevance for a linear layer or convolution, scaled to the sum of what arrived."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from relprop.graph import Node
from relprop.rules.add_normalised import spread
from relprop.rules.base import Call, Relevances, Rule, register_rule
from relprop.rules.linear_alpha_beta import LinearAlphaBeta
from relprop.rules.stabiliser import Stabiliser


@register_rule
class LinearRescaled(Rule):
    """R_in = R' sum(R_out) / stab(sum(R')), with R' what the inner rule gives to the input; sums over one sample.

    Args:
        inner: a rule for linear layers.
        stabiliser: of the division of the sums.
    Conservation:
        sum(R_in) = sum(R_out) - epsilon leak, per sample, whatever the inner rule keeps; all is lost where sum(R') = 0.
    Source: Chefer et al., ICCV 2021, code (DETR).
    """

    kind: ClassVar = ("linear", "conv")
    name: ClassVar = "rescaled"
    inner: Rule = LinearAlphaBeta()
    stabiliser: Stabiliser = Stabiliser()

    def needs(self, node: Node) -> tuple[bool, bool]:
        """What the inner rule keeps."""
        return self.inner.needs(node)

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, ..., N] -> ([T, ..., K], None, None)."""
        booked, call.absorbed = call.absorbed, None  # what the inner rule keeps is given back
        try:
            found = self.inner.propagate(call, relevance)[0]
        finally:
            call.absorbed = booked
        source = call.node.operands[0]
        assert found is not None and source is not None
        arrived = call.per_sample(call.node.outputs[0], relevance).sum(-1)
        given = call.per_sample(source, found).sum(-1)
        scale = self.stabiliser.share(arrived, given)
        if booked is not None:
            booked.add("epsilon", (arrived - scale * given).double())
        return found * spread(scale, call), None, None
