"""Pooling in proportion to what was pooled."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from relprop.graph import Node
from relprop.rules.base import Call, Relevances, Rule, plain_gradient, register_rule
from relprop.rules.stabiliser import Stabiliser
from relprop.rules.vjp import vjp


@register_rule
class PoolEpsilon(Rule):
    """R_in = x * J^T s, s = R / stab(y): shares of a mean or sum, winner takes all for a maximum.

    Args:
        stabiliser: of the share-out.
    Conservation:
        sum(R_in) = sum(R_out) - epsilon leak, per sample.
    Source: Chefer et al., CVPR 2021, code (pooling layers).
    """

    kind: ClassVar = "pool"
    name: ClassVar = "epsilon"
    stabiliser: Stabiliser = Stabiliser()

    def gradient_form(self, node: Node) -> Rule | None:
        """The plain gradient, where nothing is stabilised."""
        return plain_gradient() if self.stabiliser.is_exact else None

    def propagate(self, call: Call, relevance: Tensor) -> Relevances:
        """relevance: [T, *pooled] -> ([T, *shape],)."""
        s = call.share(self.stabiliser, relevance, call.y)
        back = vjp(call, s)[0]
        assert back is not None
        # A maximum's padding is -inf and gets nothing.
        return (torch.where(back == 0, 0.0, call.x * back), *[None] * (len(call.node.operands) - 1))
